// The namespace with its two hubs: `usage`, which is captured to the storage account, and `notifications`.

import { roles } from 'roles.bicep'

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Name of the namespace, unique in Azure.')
@minLength(6)
@maxLength(50)
param name string

@description('Throughput units to begin with: 1 MB/s or 1,000 events/s in, twice that out, each. Every deployment goes back to them.')
@minValue(1)
@maxValue(40)
param throughputUnits int = 1

@description('Auto-inflate adds throughput units up to this number. It never takes them away.')
@minValue(1)
@maxValue(40)
param maximumThroughputUnits int = 4

@description('Partitions of the hub `usage`. They cannot be changed later in the Standard tier.')
@minValue(1)
@maxValue(32)
param partitionCount int = 4

@description('Days that the hubs hold events: how long a failing Capture may stay unnoticed without a loss.')
@minValue(1)
@maxValue(7)
param retentionDays int = 7

@description('Event Hubs writes the capture files. Off: the pipeline drains the hub itself (AOAI_DRAIN=on).')
param captureEnabled bool = true

@description('Minutes until a capture file is written at the latest: AOAI_CAPTURE_MINUTES.')
@minValue(1)
@maxValue(15)
param captureMinutes int = 5

@description('AOAI_CAPTURE_NAME_FORMAT.')
param archiveNameFormat string = '{Namespace}/{EventHub}/{PartitionId}/{Year}/{Month}/{Day}/{Hour}/{Minute}/{Second}'

@description('Name of the storage account, in this resource group, that is captured to.')
param storageAccountName string

@description('Container that is captured to.')
param captureContainerName string

@description('Azure Monitor streams GatewayLogs and GatewayLlmLogs to the hub `usage`. This needs shared access keys; see below.')
param azureMonitorSends bool = true

@description('Reached by private endpoints only; API Management and Azure Monitor stay let in as trusted services.')
param private bool = false

@description('Object id of API Management\'s identity.')
param gatewayPrincipalId string

@description('Object id of the identity that the pipeline runs as.')
param pipelinePrincipalId string

@description('Object id of a person or group that simulates events. Blank: nobody.')
param operatorPrincipalId string = ''

@description('What the operator is.')
@allowed(['User', 'Group', 'ServicePrincipal'])
param operatorPrincipalType string = 'User'

@description('Log Analytics workspace that gets the namespace\'s logs.')
param logAnalyticsWorkspaceId string

resource storage 'Microsoft.Storage/storageAccounts@2025-01-01' existing = {
  name: storageAccountName

  resource blobs 'blobServices' existing = {
    name: 'default'

    resource capture 'containers' existing = {
      name: captureContainerName
    }
  }
}

resource namespace 'Microsoft.EventHub/namespaces@2024-01-01' = {
  name: name
  location: location
  tags: tags
  sku: {
    name: 'Standard'
    tier: 'Standard'
    capacity: throughputUnits
  }
  // the only kind of identity that a storage account behind a firewall lets in as a trusted service
  identity: {
    type: 'SystemAssigned'
  }
  properties: {
    isAutoInflateEnabled: maximumThroughputUnits > throughputUnits
    maximumThroughputUnits: maximumThroughputUnits > throughputUnits ? maximumThroughputUnits : 0
    minimumTlsVersion: '1.2'
    // Azure Monitor streams with the key of an authorization rule; its documentation knows no identity for it (infra/README.md has what it says).
    // Nothing else here uses a key: API Management, Capture and the pipeline have roles.
    disableLocalAuth: !azureMonitorSends
    publicNetworkAccess: private ? 'Disabled' : 'Enabled'
  }
}

resource captureWrites 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: storage::blobs::capture
  name: guid(storage::blobs::capture.id, namespace.id, roles.storageBlobDataContributor)
  properties: {
    principalId: namespace.identity.principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.storageBlobDataContributor)
  }
}

resource network 'Microsoft.EventHub/namespaces/networkRuleSets@2024-01-01' = {
  parent: namespace
  name: 'default'
  properties: {
    publicNetworkAccess: private ? 'Disabled' : 'Enabled'
    // without it Azure Monitor cannot reach a namespace that is closed to the public
    trustedServiceAccessEnabled: true
    defaultAction: private ? 'Deny' : 'Allow'
    ipRules: []
    virtualNetworkRules: []
  }
}

// All three rights on the namespace are what the documentation of diagnostic settings asks for. Azure Monitor fetches the key itself, with the rights
// of whoever deploys; it is in no output, setting or vault.
resource azureMonitorRule 'Microsoft.EventHub/namespaces/authorizationRules@2024-01-01' = if (azureMonitorSends) {
  parent: namespace
  name: 'azure-monitor'
  properties: {
    rights: ['Listen', 'Manage', 'Send']
  }
  // a namespace does one such operation at a time
  dependsOn: [network]
}

resource usage 'Microsoft.EventHub/namespaces/eventhubs@2024-01-01' = {
  parent: namespace
  name: 'usage'
  properties: {
    partitionCount: partitionCount
    retentionDescription: {
      cleanupPolicy: 'Delete'
      retentionTimeInHours: retentionDays * 24
    }
    captureDescription: captureEnabled
      ? {
          enabled: true
          encoding: 'Avro'
          intervalInSeconds: captureMinutes * 60
          sizeLimitInBytes: 314572800
          skipEmptyArchives: true
          destination: {
            name: 'EventHubArchive.AzureBlockBlob'
            identity: {
              type: 'SystemAssigned'
            }
            properties: {
              storageAccountResourceId: storage.id
              blobContainer: captureContainerName
              archiveNameFormat: archiveNameFormat
            }
          }
        }
      : null
  }
  // Capture is refused without its role
  dependsOn: [network, azureMonitorRule, captureWrites]
}

resource pipelineGroup 'Microsoft.EventHub/namespaces/eventhubs/consumergroups@2024-01-01' = {
  parent: usage
  name: 'pipeline'
}

resource notifications 'Microsoft.EventHub/namespaces/eventhubs@2024-01-01' = {
  parent: namespace
  name: 'notifications'
  properties: {
    partitionCount: 1
    retentionDescription: {
      cleanupPolicy: 'Delete'
      retentionTimeInHours: retentionDays * 24
    }
  }
  dependsOn: [usage]
}

resource gatewaySends 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: usage
  name: guid(usage.id, gatewayPrincipalId, roles.eventHubsDataSender)
  properties: {
    principalId: gatewayPrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.eventHubsDataSender)
  }
}

resource pipelineReceives 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: usage
  name: guid(usage.id, pipelinePrincipalId, roles.eventHubsDataReceiver)
  properties: {
    principalId: pipelinePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.eventHubsDataReceiver)
  }
}

resource pipelineNotifies 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: notifications
  name: guid(notifications.id, pipelinePrincipalId, roles.eventHubsDataSender)
  properties: {
    principalId: pipelinePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.eventHubsDataSender)
  }
}

resource operatorSends 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (!empty(operatorPrincipalId)) {
  scope: usage
  name: guid(usage.id, operatorPrincipalId, roles.eventHubsDataSender)
  properties: {
    principalId: operatorPrincipalId
    principalType: operatorPrincipalType
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.eventHubsDataSender)
  }
}

// ArchiveLogs say why Capture could not write a file
resource logs 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = {
  scope: namespace
  name: 'log-analytics'
  properties: {
    workspaceId: logAnalyticsWorkspaceId
    logs: [
      { category: 'ArchiveLogs', enabled: true }
      { category: 'OperationalLogs', enabled: true }
      { category: 'AutoScaleLogs', enabled: true }
    ]
  }
}

@description('Name of the namespace.')
output name string = namespace.name

@description('Resource id of the namespace.')
output id string = namespace.id

@description('Host name of the namespace: AOAI_EVENT_HUB_NAMESPACE.')
output hostName string = '${namespace.name}.servicebus.windows.net'

@description('Name of the hub that usage is sent to: AOAI_EVENT_HUB_NAME.')
output usageHubName string = usage.name

@description('Consumer group of the pipeline: AOAI_EVENT_HUB_CONSUMER_GROUP.')
output consumerGroupName string = pipelineGroup.name

@description('Name of the hub that notifications are sent to: AOAI_NOTIFY_EVENT_HUB.')
output notificationsHubName string = notifications.name

@description('Resource id of the authorization rule that diagnostic settings name; blank without it.')
output azureMonitorRuleId string = azureMonitorSends ? azureMonitorRule.id : ''
