// Cosmos DB for NoSQL: what the pipeline publishes for programs and Power BI. docs/cosmos.md says what is in the containers.

import { cosmosRoles } from 'roles.bicep'

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Name of the account, unique in Azure: lower-case letters, digits and hyphens.')
@minLength(3)
@maxLength(44)
param name string

@description('Name of the database: AOAI_COSMOS_DATABASE.')
param databaseName string = 'aoai-usage'

@description('Request units per second that each container scales up to; a tenth of it is what an idle one costs.')
@minValue(1000)
param autoscaleMaxThroughput int = 1000

@description('Replicas in several availability zones, where the region has them.')
param zoneRedundant bool = false

@description('Disabled needs a private endpoint.')
@allowed(['Enabled', 'Disabled'])
param publicNetworkAccess string = 'Enabled'

@description('Object id of the identity that the pipeline runs as.')
param pipelinePrincipalId string

@description('Object ids of people or groups that read the documents, such as with Power BI.')
param readerPrincipalIds array = []

var containers = [
  {
    name: 'daily-billing'
    partitionKey: ['/costCenter', '/billingPeriod']
    indexed: [
      'costCenter'
      'billingPeriod'
      'usageDate'
      'subscriptionId'
      'product'
      'application'
      'team'
      'department'
      'deployment'
      'model'
      'meter'
      'chargeClass'
    ]
  }
  {
    name: 'usage'
    partitionKey: ['/subscriptionId', '/usageDate']
    indexed: [
      'subscriptionId'
      'usageDate'
      'eventTime'
      'product'
      'application'
      'team'
      'costCenter'
      'deployment'
      'model'
      'endUser'
      'pricingStatus'
    ]
    // 92 days: the pipeline publishes 90 usage dates
    timeToLive: 7948800
  }
  {
    name: 'statements'
    partitionKey: ['/billingPeriod']
    indexed: ['billingPeriod', 'costCenter']
  }
]

resource account 'Microsoft.DocumentDB/databaseAccounts@2025-04-15' = {
  name: name
  location: location
  tags: tags
  kind: 'GlobalDocumentDB'
  properties: {
    databaseAccountOfferType: 'Standard'
    locations: [
      {
        locationName: location
        failoverPriority: 0
        isZoneRedundant: zoneRedundant
      }
    ]
    consistencyPolicy: {
      defaultConsistencyLevel: 'Session'
    }
    // seven days of point-in-time restore are free; the documents can be published again from the lake anyway
    backupPolicy: {
      type: 'Continuous'
      continuousModeProperties: {
        tier: 'Continuous7Days'
      }
    }
    disableLocalAuth: true
    disableKeyBasedMetadataWriteAccess: true
    minimalTlsVersion: 'Tls12'
    publicNetworkAccess: publicNetworkAccess
  }
}

resource database 'Microsoft.DocumentDB/databaseAccounts/sqlDatabases@2025-04-15' = {
  parent: account
  name: databaseName
  properties: {
    resource: {
      id: databaseName
    }
  }
}

resource container 'Microsoft.DocumentDB/databaseAccounts/sqlDatabases/containers@2025-04-15' = [
  for item in containers: {
    parent: database
    name: item.name
    properties: {
      resource: union(
        {
          id: item.name
          partitionKey: {
            kind: length(item.partitionKey) > 1 ? 'MultiHash' : 'Hash'
            paths: item.partitionKey
            version: 2
          }
          indexingPolicy: {
            indexingMode: 'consistent'
            automatic: true
            includedPaths: map(item.indexed, field => { path: '/${field}/?' })
            excludedPaths: [{ path: '/*' }]
          }
        },
        // no TTL at all where documents stay
        contains(item, 'timeToLive') ? { defaultTtl: item.timeToLive } : {}
      )
      options: {
        autoscaleSettings: {
          maxThroughput: autoscaleMaxThroughput
        }
      }
    }
  }
]

// a role of the data plane, on the database alone: it reads and writes documents and cannot make containers
resource pipelineWrites 'Microsoft.DocumentDB/databaseAccounts/sqlRoleAssignments@2025-04-15' = {
  parent: account
  name: guid(account.id, databaseName, pipelinePrincipalId, cosmosRoles.dataContributor)
  properties: {
    principalId: pipelinePrincipalId
    roleDefinitionId: '${account.id}/sqlRoleDefinitions/${cosmosRoles.dataContributor}'
    scope: '${account.id}/dbs/${database.name}'
  }
}

// one after the other: an account refuses role assignments that are made at the same time
@batchSize(1)
resource readers 'Microsoft.DocumentDB/databaseAccounts/sqlRoleAssignments@2025-04-15' = [
  for principalId in readerPrincipalIds: {
    parent: account
    name: guid(account.id, databaseName, principalId, cosmosRoles.dataReader)
    properties: {
      principalId: principalId
      roleDefinitionId: '${account.id}/sqlRoleDefinitions/${cosmosRoles.dataReader}'
      scope: '${account.id}/dbs/${database.name}'
    }
    dependsOn: [pipelineWrites]
  }
]

@description('Name of the account.')
output name string = account.name

@description('Resource id of the account.')
output id string = account.id

@description('AOAI_COSMOS_ENDPOINT.')
output endpoint string = account.properties.documentEndpoint

@description('AOAI_COSMOS_DATABASE.')
output databaseName string = database.name
