// Azure Container Apps: Dagster's webserver, its daemon, and the code location, which also executes the runs. One image for all three.

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Names begin with it: lower-case letters, digits and hyphens. The same as the environment\'s.')
@maxLength(22)
param namePrefix string

@description('Resource id of the environment of container-apps-environment.bicep.')
param environmentId string

@description('The image, such as contoso.azurecr.io/aoai-usage-pipeline:0.2.0. Blank: no app is made, as long as there is no image.')
param image string = ''

@description('Host name of the registry that the image is pulled from.')
param registryServer string

@description('Resource id of the user-assigned identity that the apps run as: it pulls the image, reads the Key Vault, and is what the pipeline signs in with.')
param identityId string

@description('Client id of that identity.')
param identityClientId string

@description('Host name of the PostgreSQL server that Dagster keeps its runs in.')
param postgresHostName string

@description('Its database.')
param postgresDatabaseName string

@description('The user that the identity is there.')
param postgresUserName string

@description('Settings of docs/settings.md that are no secrets, by name: { AOAI_LAKE_URL: \'https://…\' }.')
param settings object

@description('Settings that are secrets, by name: the address of the Key Vault secret that has the value. { AOAI_HASH_KEY: \'https://….vault.azure.net/secrets/hash-key\' }.')
param keyVaultSecrets object = {}

@description('Client id of the app registration that people sign in to. Blank: nobody does, and the web interface is not reachable from outside of the environment.')
param authClientId string = ''

@description('Object ids of Entra ID groups that may sign in; the app registration must put groups into its tokens. Blank with no identities: everybody whom the app registration lets in.')
param allowedGroups array = []

@description('Object ids of users who may sign in beside the groups.')
param allowedIdentities array = []

@description('Programs that may call the web interface with tokens of their own, such as the Function App: { clientId, principalId } each.')
param callers array = []

@description('Cores of the code location. Two runs at a time are executed there.')
param codeLocationCpu string = '2.0'

@description('Memory of the code location: 2 Gi per core.')
param codeLocationMemory string = '4Gi'

var webserverName = '${namePrefix}-webserver'
var daemonName = '${namePrefix}-daemon'
var codeLocationName = '${namePrefix}-code'
var codeLocationPort = 4000
var webserverPort = 3000
var deployed = !empty(image)
var signIn = !empty(authClientId)
// naming a program must not shut people out where nobody is named
var identities = empty(allowedGroups) && empty(allowedIdentities) ? [] : concat(allowedIdentities, map(callers, caller => caller.principalId))
var principals = union(empty(allowedGroups) ? {} : { groups: allowedGroups }, empty(identities) ? {} : { identities: identities })

var secrets = map(items(keyVaultSecrets), secret => {
  name: toLower(replace(secret.key, '_', '-'))
  keyVaultUrl: secret.value
  identity: identityId
})

var dagsterEnvironment = [
  // which of the identities azure-identity signs in with
  { name: 'AZURE_CLIENT_ID', value: identityClientId }
  { name: 'DAGSTER_POSTGRES_HOST', value: postgresHostName }
  { name: 'DAGSTER_POSTGRES_DATABASE', value: postgresDatabaseName }
  { name: 'DAGSTER_POSTGRES_USER', value: postgresUserName }
  { name: 'DAGSTER_CODE_LOCATION_HOST', value: codeLocationName }
]

var pipelineEnvironment = concat(
  map(items(settings), setting => { name: setting.key, value: string(setting.value) }),
  map(items(keyVaultSecrets), secret => { name: secret.key, secretRef: toLower(replace(secret.key, '_', '-')) })
)

var registries = [{ server: registryServer, identity: identityId }]

// The runs are processes of this container (DefaultRunLauncher), so there is one replica, and it has the cores.
resource codeLocation 'Microsoft.App/containerApps@2025-01-01' = if (deployed) {
  name: codeLocationName
  location: location
  tags: tags
  identity: {
    type: 'UserAssigned'
    userAssignedIdentities: { '${identityId}': {} }
  }
  properties: {
    environmentId: environmentId
    workloadProfileName: 'Consumption'
    configuration: {
      activeRevisionsMode: 'Single'
      registries: registries
      secrets: secrets
      // gRPC, for the webserver and the daemon; nothing outside of the environment reaches it
      ingress: {
        external: false
        transport: 'tcp'
        targetPort: codeLocationPort
        exposedPort: codeLocationPort
      }
    }
    template: {
      containers: [
        {
          name: 'code-location'
          image: image
          command: ['dagster', 'code-server', 'start']
          args: ['--host', '0.0.0.0', '--port', string(codeLocationPort), '--module-name', 'aoai_usage_pipeline.definitions']
          env: concat(dagsterEnvironment, pipelineEnvironment)
          resources: {
            cpu: json(codeLocationCpu)
            memory: codeLocationMemory
          }
          probes: [
            { type: 'Startup', tcpSocket: { port: codeLocationPort }, periodSeconds: 20, timeoutSeconds: 5, failureThreshold: 10 }
            { type: 'Readiness', tcpSocket: { port: codeLocationPort }, periodSeconds: 10, failureThreshold: 3 }
            { type: 'Liveness', tcpSocket: { port: codeLocationPort }, periodSeconds: 30, failureThreshold: 5 }
          ]
        }
      ]
      scale: {
        minReplicas: 1
        maxReplicas: 1
      }
    }
  }
}

// Exactly one: two daemons would do every tick twice. It has no port; it ends, and is started again, when one of its threads dies.
resource daemon 'Microsoft.App/containerApps@2025-01-01' = if (deployed) {
  name: daemonName
  location: location
  tags: tags
  identity: {
    type: 'UserAssigned'
    userAssignedIdentities: { '${identityId}': {} }
  }
  properties: {
    environmentId: environmentId
    workloadProfileName: 'Consumption'
    configuration: {
      activeRevisionsMode: 'Single'
      registries: registries
    }
    template: {
      containers: [
        {
          name: 'daemon'
          image: image
          command: ['dagster-daemon', 'run']
          args: ['--workspace', 'workspace.yaml']
          env: dagsterEnvironment
          resources: {
            cpu: json('0.5')
            memory: '1Gi'
          }
        }
      ]
      scale: {
        minReplicas: 1
        maxReplicas: 1
      }
    }
  }
  dependsOn: [codeLocation]
}

// Dagster has no sign-in of its own: whoever reaches it can start runs. So it is reachable from outside only behind Entra ID.
resource webserver 'Microsoft.App/containerApps@2025-01-01' = if (deployed) {
  name: webserverName
  location: location
  tags: tags
  identity: {
    type: 'UserAssigned'
    userAssignedIdentities: { '${identityId}': {} }
  }
  properties: {
    environmentId: environmentId
    workloadProfileName: 'Consumption'
    configuration: {
      activeRevisionsMode: 'Single'
      registries: registries
      ingress: {
        external: signIn
        transport: 'http'
        targetPort: webserverPort
        allowInsecure: false
      }
    }
    template: {
      containers: [
        {
          name: 'webserver'
          image: image
          command: ['dagster-webserver']
          args: ['--host', '0.0.0.0', '--port', string(webserverPort), '--workspace', 'workspace.yaml']
          env: dagsterEnvironment
          resources: {
            cpu: json('0.5')
            memory: '1Gi'
          }
          probes: [
            { type: 'Startup', httpGet: { port: webserverPort, path: '/server_info' }, periodSeconds: 20, timeoutSeconds: 5, failureThreshold: 10 }
            { type: 'Readiness', httpGet: { port: webserverPort, path: '/server_info' }, periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 3 }
            { type: 'Liveness', httpGet: { port: webserverPort, path: '/server_info' }, periodSeconds: 30, timeoutSeconds: 10, failureThreshold: 5 }
          ]
        }
      ]
      scale: {
        minReplicas: 1
        maxReplicas: 1
      }
    }
  }
  dependsOn: [codeLocation]
}

resource entraSignIn 'Microsoft.App/containerApps/authConfigs@2025-01-01' = if (deployed && signIn) {
  parent: webserver
  name: 'current'
  properties: {
    platform: {
      enabled: true
    }
    globalValidation: {
      unauthenticatedClientAction: 'RedirectToLoginPage'
      redirectToProvider: 'azureactivedirectory'
    }
    httpSettings: {
      requireHttps: true
    }
    identityProviders: {
      azureActiveDirectory: {
        enabled: true
        // without a secret people sign in by an ID token, which is all that is needed here
        registration: {
          clientId: authClientId
          openIdIssuer: '${environment().authentication.loginEndpoint}${tenant().tenantId}/v2.0'
        }
        validation: {
          allowedAudiences: [authClientId, 'api://${authClientId}']
          defaultAuthorizationPolicy: union(
            { allowedApplications: concat([authClientId], map(callers, caller => caller.clientId)) },
            empty(principals) ? {} : { allowedPrincipals: principals }
          )
        }
      }
    }
  }
}

@description('Name of the app that is the web interface.')
output webserverName string = webserverName

@description('Name of the app that is the daemon.')
output daemonName string = daemonName

@description('Name of the app that is the code location.')
output codeLocationName string = codeLocationName
