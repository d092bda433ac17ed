// Azure Container Registry: the one image that webserver, daemon and code location run. No admin user: it is pulled by identity.

import { roles } from 'roles.bicep'

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Name of the registry: 5 to 50 letters and digits, unique in Azure.')
@minLength(5)
@maxLength(50)
param name string

@description('Basic is enough. Premium is what private endpoints need.')
@allowed(['Basic', 'Standard', 'Premium'])
param sku string = 'Basic'

@description('Disabled needs a private endpoint, and with it the Premium tier. Builds by `az acr build` then need an agent pool or a build elsewhere.')
@allowed(['Enabled', 'Disabled'])
param publicNetworkAccess string = 'Enabled'

@description('Object id of the identity that pulls the image.')
param pullPrincipalId string

resource registry 'Microsoft.ContainerRegistry/registries@2025-04-01' = {
  name: name
  location: location
  tags: tags
  sku: {
    name: sku
  }
  properties: {
    adminUserEnabled: false
    anonymousPullEnabled: false
    publicNetworkAccess: publicNetworkAccess
  }
}

resource pull 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: registry
  name: guid(registry.id, pullPrincipalId, roles.acrPull)
  properties: {
    principalId: pullPrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.acrPull)
  }
}

@description('Name of the registry.')
output name string = registry.name

@description('Resource id of the registry.')
output id string = registry.id

@description('Host name that images are named with.')
output loginServer string = registry.properties.loginServer
