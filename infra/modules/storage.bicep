// The storage account: capture files as Event Hubs wrote them, the lake, and the reference files. There are no shared keys.

import { roles } from 'roles.bicep'

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Name of the account, unique in Azure.')
@minLength(3)
@maxLength(24)
param name string

@description('Redundancy. The lake is the record of all bills, and the capture files prove it.')
@allowed(['Standard_LRS', 'Standard_ZRS', 'Standard_GRS', 'Standard_GZRS', 'Standard_RAGRS', 'Standard_RAGZRS'])
param skuName string = 'Standard_ZRS'

@description('Reached by private endpoints only; Event Hubs Capture stays let in as a trusted service.')
param private bool = false

@description('Days after which capture files are deleted; 0: never. A bill can be verified as long as its capture files are there.')
@minValue(0)
param captureRetentionDays int = 730

@description('Days after which capture files move to the cool tier. They are read once, within the hour, and again only to verify or replay.')
@minValue(1)
param captureCoolAfterDays int = 30

@description('Days after which raw events of the lake move to the cool tier. A bill of a day that changes reads them again.')
@minValue(1)
param lakeCoolAfterDays int = 120

@description('Days that a deleted or overwritten blob, and a deleted container, can be restored.')
@minValue(1)
@maxValue(365)
param softDeleteDays int = 14

@description('Object id of the identity that the pipeline runs as.')
param pipelinePrincipalId string

@description('The pipeline writes capture files itself (AOAI_DRAIN=on), instead of Event Hubs Capture.')
param drain bool = false

@description('Object id of a person or group that uploads reference files, looks into the lake, and simulates events. Blank: nobody.')
param operatorPrincipalId string = ''

@description('What the operator is.')
@allowed(['User', 'Group', 'ServicePrincipal'])
param operatorPrincipalType string = 'User'

@description('Object ids of people or groups that read the lake, such as with Power BI.')
param lakeReaderPrincipalIds array = []

var captureRetention = captureRetentionDays == 0 ? {} : { delete: { daysAfterModificationGreaterThan: captureRetentionDays } }

resource account 'Microsoft.Storage/storageAccounts@2025-01-01' = {
  name: name
  location: location
  tags: tags
  kind: 'StorageV2'
  sku: {
    name: skuName
  }
  properties: {
    accessTier: 'Hot'
    allowBlobPublicAccess: false
    allowSharedKeyAccess: false
    defaultToOAuthAuthentication: true
    allowCrossTenantReplication: false
    minimumTlsVersion: 'TLS1_2'
    supportsHttpsTrafficOnly: true
    // not Disabled: that would shut out the trusted services too, and with them Capture
    publicNetworkAccess: 'Enabled'
    networkAcls: {
      bypass: 'AzureServices'
      defaultAction: private ? 'Deny' : 'Allow'
    }
  }
}

resource blobs 'Microsoft.Storage/storageAccounts/blobServices@2025-01-01' = {
  parent: account
  name: 'default'
  properties: {
    deleteRetentionPolicy: {
      enabled: true
      days: softDeleteDays
    }
    containerDeleteRetentionPolicy: {
      enabled: true
      days: softDeleteDays
    }
  }
}

resource capture 'Microsoft.Storage/storageAccounts/blobServices/containers@2025-01-01' = {
  parent: blobs
  name: 'capture'
}

resource lake 'Microsoft.Storage/storageAccounts/blobServices/containers@2025-01-01' = {
  parent: blobs
  name: 'lake'
}

resource referenceFiles 'Microsoft.Storage/storageAccounts/blobServices/containers@2025-01-01' = {
  parent: blobs
  name: 'reference'
}

resource lifecycle 'Microsoft.Storage/storageAccounts/managementPolicies@2025-01-01' = {
  parent: account
  name: 'default'
  properties: {
    policy: {
      rules: [
        {
          name: 'capture-files'
          type: 'Lifecycle'
          definition: {
            filters: {
              blobTypes: ['blockBlob']
              prefixMatch: ['${capture.name}/']
            }
            actions: {
              baseBlob: union({ tierToCool: { daysAfterModificationGreaterThan: captureCoolAfterDays } }, captureRetention)
            }
          }
        }
        // nothing in the lake is deleted by age: what no manifest names, the pipeline removes itself
        {
          name: 'lake-raw-events'
          type: 'Lifecycle'
          definition: {
            filters: {
              blobTypes: ['blockBlob']
              prefixMatch: ['${lake.name}/raw_events/']
            }
            actions: {
              baseBlob: {
                tierToCool: { daysAfterModificationGreaterThan: lakeCoolAfterDays }
              }
            }
          }
        }
      ]
    }
  }
  dependsOn: [blobs]
}

var pipelineCaptureRole = drain ? roles.storageBlobDataContributor : roles.storageBlobDataReader

resource pipelineReadsCapture 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: capture
  name: guid(capture.id, pipelinePrincipalId, pipelineCaptureRole)
  properties: {
    principalId: pipelinePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', pipelineCaptureRole)
  }
}

resource pipelineWritesLake 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: lake
  name: guid(lake.id, pipelinePrincipalId, roles.storageBlobDataContributor)
  properties: {
    principalId: pipelinePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.storageBlobDataContributor)
  }
}

resource pipelineReadsReference 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: referenceFiles
  name: guid(referenceFiles.id, pipelinePrincipalId, roles.storageBlobDataReader)
  properties: {
    principalId: pipelinePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.storageBlobDataReader)
  }
}

resource operatorReadsCapture 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (!empty(operatorPrincipalId)) {
  scope: capture
  name: guid(capture.id, operatorPrincipalId, roles.storageBlobDataReader)
  properties: {
    principalId: operatorPrincipalId
    principalType: operatorPrincipalType
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.storageBlobDataReader)
  }
}

resource operatorReadsLake 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (!empty(operatorPrincipalId)) {
  scope: lake
  name: guid(lake.id, operatorPrincipalId, roles.storageBlobDataReader)
  properties: {
    principalId: operatorPrincipalId
    principalType: operatorPrincipalType
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.storageBlobDataReader)
  }
}

resource operatorWritesReference 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (!empty(operatorPrincipalId)) {
  scope: referenceFiles
  name: guid(referenceFiles.id, operatorPrincipalId, roles.storageBlobDataContributor)
  properties: {
    principalId: operatorPrincipalId
    principalType: operatorPrincipalType
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.storageBlobDataContributor)
  }
}

resource lakeReaders 'Microsoft.Authorization/roleAssignments@2022-04-01' = [
  for principalId in lakeReaderPrincipalIds: {
    scope: lake
    name: guid(lake.id, principalId, roles.storageBlobDataReader)
    properties: {
      principalId: principalId
      roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.storageBlobDataReader)
    }
  }
]

// Power BI's file of who reads which cost centre lies there
resource lakeReadersReference 'Microsoft.Authorization/roleAssignments@2022-04-01' = [
  for principalId in lakeReaderPrincipalIds: {
    scope: referenceFiles
    name: guid(referenceFiles.id, principalId, roles.storageBlobDataReader)
    properties: {
      principalId: principalId
      roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.storageBlobDataReader)
    }
  }
]

@description('Name of the account.')
output name string = account.name

@description('Resource id of the account.')
output id string = account.id

@description('Name of the container of the capture files.')
output captureContainerName string = capture.name

@description('AOAI_CAPTURE_URL.')
output captureUrl string = '${account.properties.primaryEndpoints.blob}${capture.name}'

@description('AOAI_LAKE_URL.')
output lakeUrl string = '${account.properties.primaryEndpoints.blob}${lake.name}'

@description('Where the reference files are uploaded to.')
output referenceUrl string = '${account.properties.primaryEndpoints.blob}${referenceFiles.name}'
