metadata description = 'The Function App: receives the pipeline\'s notifications and hands them to Teams and e-mail, and tells Dagster about new capture files.'

@description('Region of all resources of the module.')
param location string

@description('Tags of all resources of the module.')
param tags object

@description('Name of the Function App; it is in its host name and must be globally unique.')
@maxLength(60)
param name string

@description('Name of the app\'s own storage account: its package, its locks and the notifications it has seen. Globally unique.')
@minLength(3)
@maxLength(24)
param storageAccountName string

@description('Name of the Key Vault of the deployment, in this resource group. The module adds its secrets to it.')
param keyVaultName string

@description('Name of the Application Insights of the deployment, in this resource group.')
param applicationInsightsName string

@description('Name of the Event Hubs namespace of the deployment, in this resource group.')
param eventHubsNamespaceName string

@description('The hub whose capture files are told to Dagster.')
param eventHubName string = 'usage'

@description('Base URL of the Dagster UI, such as https://host; empty: new capture files wait for the sensor.')
param dagsterUrl string = ''

@description('Audience of the token for the Dagster UI: the application ID URI of its Entra ID app registration, such as api://<client id>.')
param dagsterAudience string = ''

@description('URL of the Teams workflow "when a Teams webhook request is received"; empty: nothing is posted to Teams.')
@secure()
param teamsWebhookUrl string = ''

@description('Addresses that get every notification by e-mail, separated by commas; empty: no mail is sent and no Communication Services are made.')
param mailTo string = ''

@description('Where Communication Services keep data at rest, such as Europe or United States.')
param mailDataLocation string = 'Europe'

@description('The key the pipeline shows to the receiver. A new one for every deployment is fine: both sides get it from this deployment.')
@secure()
param receiverKey string

@description('Id of a subnet delegated to Microsoft.App/environments, for a Key Vault or a Dagster UI that is private; empty: no virtual network.')
param subnetId string = ''

@description('Whether the app\'s code is deployed. Event Grid takes a function as a target only once it is there: false in the first deployment.')
param codeDeployed bool = false

var roles = {
  storageBlobDataOwner: 'b7e6dc6d-f1e8-4753-8033-0f276bb0955b'
  keyVaultSecretsUser: '4633458b-17de-408a-b874-0445c86b69e6'
  monitoringMetricsPublisher: '3913510d-42f4-4e42-8a64-420c390055eb'
  communicationAndEmailServiceOwner: '09976791-48a7-449e-bb21-39d1a415f350'
}
var mails = !empty(mailTo)
var teams = !empty(teamsWebhookUrl)
var packageContainer = 'packages'
var seenContainer = 'notifications'

resource keyVault 'Microsoft.KeyVault/vaults@2024-11-01' existing = {
  name: keyVaultName
}

resource applicationInsights 'Microsoft.Insights/components@2020-02-02' existing = {
  name: applicationInsightsName
}

resource eventHubsNamespace 'Microsoft.EventHub/namespaces@2024-01-01' existing = {
  name: eventHubsNamespaceName
}

resource identity 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' = {
  name: '${name}-identity'
  location: location
  tags: tags
}

resource storage 'Microsoft.Storage/storageAccounts@2024-01-01' = {
  name: storageAccountName
  location: location
  tags: tags
  kind: 'StorageV2'
  sku: {
    name: 'Standard_LRS'
  }
  properties: {
    allowBlobPublicAccess: false
    allowSharedKeyAccess: false
    minimumTlsVersion: 'TLS1_2'
    supportsHttpsTrafficOnly: true
  }

  resource blobs 'blobServices' = {
    name: 'default'

    resource packages 'containers' = {
      name: packageContainer
    }

    resource seen 'containers' = {
      name: seenContainer
    }
  }

  resource lifecycle 'managementPolicies' = {
    name: 'default'
    properties: {
      policy: {
        rules: [
          {
            name: 'forget-notifications'
            type: 'Lifecycle'
            definition: {
              filters: {
                blobTypes: [
                  'blockBlob'
                ]
                prefixMatch: [
                  '${seenContainer}/'
                ]
              }
              actions: {
                baseBlob: {
                  delete: {
                    daysAfterModificationGreaterThan: 30
                  }
                }
              }
            }
          }
        ]
      }
    }
  }
}

resource storageRole 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: storage
  name: guid(storage.id, identity.id, roles.storageBlobDataOwner)
  properties: {
    principalId: identity.properties.principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.storageBlobDataOwner)
  }
}

resource insightsRole 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: applicationInsights
  name: guid(applicationInsights.id, identity.id, roles.monitoringMetricsPublisher)
  properties: {
    principalId: identity.properties.principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.monitoringMetricsPublisher)
  }
}

resource receiverKeySecret 'Microsoft.KeyVault/vaults/secrets@2024-11-01' = {
  parent: keyVault
  name: 'notification-receiver-key'
  tags: tags
  properties: {
    value: receiverKey
  }
}

resource receiverKeyRole 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: receiverKeySecret
  name: guid(receiverKeySecret.id, identity.id, roles.keyVaultSecretsUser)
  properties: {
    principalId: identity.properties.principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.keyVaultSecretsUser)
  }
}

resource teamsSecret 'Microsoft.KeyVault/vaults/secrets@2024-11-01' = if (teams) {
  parent: keyVault
  name: 'teams-webhook-url'
  tags: tags
  properties: {
    value: teamsWebhookUrl
  }
}

resource teamsSecretRole 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (teams) {
  scope: teamsSecret
  name: guid(keyVault.id, 'teams-webhook-url', identity.id, roles.keyVaultSecretsUser)
  properties: {
    principalId: identity.properties.principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.keyVaultSecretsUser)
  }
}

resource emailService 'Microsoft.Communication/emailServices@2023-04-01' = if (mails) {
  name: '${name}-mail'
  location: 'global'
  tags: tags
  properties: {
    dataLocation: mailDataLocation
  }

  resource domain 'domains' = {
    name: 'AzureManagedDomain'
    location: 'global'
    tags: tags
    properties: {
      domainManagement: 'AzureManaged'
      userEngagementTracking: 'Disabled'
    }
  }
}

resource communication 'Microsoft.Communication/communicationServices@2023-04-01' = if (mails) {
  name: '${name}-communication'
  location: 'global'
  tags: tags
  properties: {
    dataLocation: mailDataLocation
    linkedDomains: [
      emailService::domain.id
    ]
  }
}

resource communicationRole 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (mails) {
  scope: communication
  name: guid(resourceGroup().id, '${name}-communication', identity.id, roles.communicationAndEmailServiceOwner)
  properties: {
    principalId: identity.properties.principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.communicationAndEmailServiceOwner)
  }
}

resource plan 'Microsoft.Web/serverfarms@2024-04-01' = {
  name: '${name}-plan'
  location: location
  tags: tags
  kind: 'functionapp'
  sku: {
    name: 'FC1'
    tier: 'FlexConsumption'
  }
  properties: {
    reserved: true
  }
}

resource app 'Microsoft.Web/sites@2024-04-01' = {
  name: name
  location: location
  // azd deploys infra/functions to the app that has this tag
  tags: union(tags, {
    'azd-service-name': 'functions'
  })
  kind: 'functionapp,linux'
  identity: {
    type: 'UserAssigned'
    userAssignedIdentities: {
      '${identity.id}': {}
    }
  }
  properties: {
    serverFarmId: plan.id
    httpsOnly: true
    keyVaultReferenceIdentity: identity.id
    virtualNetworkSubnetId: empty(subnetId) ? null : subnetId
    functionAppConfig: {
      deployment: {
        storage: {
          type: 'blobContainer'
          value: '${storage.properties.primaryEndpoints.blob}${packageContainer}'
          authentication: {
            type: 'UserAssignedIdentity'
            userAssignedIdentityResourceId: identity.id
          }
        }
      }
      runtime: {
        name: 'python'
        version: '3.11'
      }
      scaleAndConcurrency: {
        instanceMemoryMB: 512
        maximumInstanceCount: 40
      }
    }
    siteConfig: {
      appSettings: [
        {
          name: 'APPLICATIONINSIGHTS_AUTHENTICATION_STRING'
          value: 'Authorization=AAD;ClientId=${identity.properties.clientId}'
        }
        {
          name: 'APPLICATIONINSIGHTS_CONNECTION_STRING'
          value: applicationInsights.properties.ConnectionString
        }
        {
          name: 'AZURE_CLIENT_ID'
          value: identity.properties.clientId
        }
        {
          name: 'AzureWebJobsStorage__accountName'
          value: storage.name
        }
        {
          name: 'AzureWebJobsStorage__clientId'
          value: identity.properties.clientId
        }
        {
          name: 'AzureWebJobsStorage__credential'
          value: 'managedidentity'
        }
        {
          name: 'DAGSTER_AUDIENCE'
          value: dagsterAudience
        }
        {
          name: 'DAGSTER_URL'
          value: dagsterUrl
        }
        {
          name: 'MAIL_ENDPOINT'
          value: mails ? 'https://${communication!.properties.hostName}' : ''
        }
        {
          name: 'MAIL_FROM'
          value: mails ? 'DoNotReply@${emailService::domain!.properties.fromSenderDomain}' : ''
        }
        {
          name: 'MAIL_TO'
          value: mailTo
        }
        {
          name: 'RECEIVER_KEY'
          value: '@Microsoft.KeyVault(SecretUri=${receiverKeySecret.properties.secretUriWithVersion})'
        }
        {
          name: 'SEEN_CONTAINER_URL'
          value: '${storage.properties.primaryEndpoints.blob}${seenContainer}'
        }
        {
          name: 'TEAMS_WEBHOOK_URL'
          value: teams ? '@Microsoft.KeyVault(SecretUri=${teamsSecret!.properties.secretUriWithVersion})' : ''
        }
      ]
      ftpsState: 'Disabled'
      minTlsVersion: '1.2'
    }
  }
  dependsOn: [
    storage::blobs::packages
    storage::blobs::seen
    storageRole
    receiverKeyRole
    teamsSecretRole
  ]

  resource scmPublishing 'basicPublishingCredentialsPolicies' = {
    name: 'scm'
    properties: {
      allow: false
    }
  }

  resource ftpPublishing 'basicPublishingCredentialsPolicies' = {
    name: 'ftp'
    properties: {
      allow: false
    }
  }
}

resource webhookUrlSecret 'Microsoft.KeyVault/vaults/secrets@2024-11-01' = {
  parent: keyVault
  name: 'notify-webhook-url'
  tags: tags
  properties: {
    value: 'https://${app.properties.defaultHostName}/api/notifications?code=${receiverKey}'
  }
}

resource captureTopic 'Microsoft.EventGrid/systemTopics@2025-02-15' = {
  name: '${name}-capture'
  location: location
  tags: tags
  properties: {
    source: eventHubsNamespace.id
    topicType: 'Microsoft.EventHub.Namespaces'
  }

  resource captureFileCreated 'eventSubscriptions' = if (codeDeployed) {
    name: 'capture-file-created'
    properties: {
      destination: {
        endpointType: 'AzureFunction'
        properties: {
          resourceId: '${app.id}/functions/capture_file_created'
          maxEventsPerBatch: 1
        }
      }
      eventDeliverySchema: 'EventGridSchema'
      filter: {
        includedEventTypes: [
          'Microsoft.EventHub.CaptureFileCreated'
        ]
        subjectBeginsWith: 'eventhubs/${eventHubName}'
      }
      // what cannot be told within minutes is found by the sensor
      retryPolicy: {
        eventTimeToLiveInMinutes: 10
        maxDeliveryAttempts: 5
      }
    }
  }
}

@description('Name of the Function App.')
output name string = app.name

@description('Id of the Function App.')
output id string = app.id

@description('Host name of the Function App.')
output hostName string = app.properties.defaultHostName

@description('Client id of the app\'s identity; the Dagster UI must let it in for new capture files to be told.')
output identityClientId string = identity.properties.clientId

@description('Principal id of the app\'s identity.')
output identityPrincipalId string = identity.properties.principalId

@description('URI, with its version, of the secret that is the pipeline\'s AOAI_NOTIFY_WEBHOOK_URL.')
output webhookUrlSecretUri string = webhookUrlSecret.properties.secretUriWithVersion
