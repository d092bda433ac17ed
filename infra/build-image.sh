#!/bin/sh
# Builds the image of this commit in the registry, unless it is there already, and prints its name.
#   infra/build-image.sh [REGISTRY]
# Called by azd, which names the registry in the environment, it also notes the name for the next `azd provision`.
set -eu
cd "$(dirname "$0")/.."
registry=${1:-${AZURE_CONTAINER_REGISTRY_NAME:?name the registry}}
tag=$(git describe --always --dirty --abbrev=12)
image=$(az acr show --name "$registry" --query loginServer --output tsv)/aoai-usage-pipeline:$tag
case $tag in
*-dirty) known= ;;
*) known=$(az acr repository show --name "$registry" --image "aoai-usage-pipeline:$tag" --query name --output tsv 2>/dev/null || true) ;;
esac
if [ -z "$known" ]; then
    az acr build --registry "$registry" --image "aoai-usage-pipeline:$tag" . >&2
fi
if [ -n "${AZURE_ENV_NAME:-}" ] && [ "${AOAI_IMAGE:-}" != "$image" ]; then
    azd env set AOAI_IMAGE "$image"
    echo "The image is built. Run azd provision once more: it starts the apps with it." >&2
fi
echo "$image"
