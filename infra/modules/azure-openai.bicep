// Azure OpenAI accounts with their model deployments. API Management reaches them with its identity; there are no keys.

import { roles } from 'roles.bicep'

@description('Region of accounts that name none.')
param location string

@description('Tags of every resource.')
param tags object

@description('Names begin with it; they are in host names and must be unique in Azure.')
@maxLength(54)
param namePrefix string

// calls go to all of them in turn, so they should have the same deployments
@description('Accounts: [{ name, location, deployments: [{ name, model, version, sku, capacity }] }].')
param accounts array

@description('Disabled needs private endpoints.')
@allowed(['Enabled', 'Disabled'])
param publicNetworkAccess string = 'Enabled'

@description('Object id of API Management\'s identity.')
param gatewayPrincipalId string

@description('Log Analytics workspace that gets audit logs and metrics. Request logs are the gateway\'s.')
param logAnalyticsWorkspaceId string

// every deployment with the place of its account
var deployments = flatten(map(range(0, length(accounts)), i => map(accounts[i].deployments, deployment => { account: i, deployment: deployment })))

resource account 'Microsoft.CognitiveServices/accounts@2025-06-01' = [
  for item in accounts: {
    name: '${namePrefix}-${item.name}'
    location: item.?location ?? location
    tags: tags
    kind: 'OpenAI'
    sku: {
      name: 'S0'
    }
    properties: {
      customSubDomainName: '${namePrefix}-${item.name}'
      disableLocalAuth: true
      publicNetworkAccess: publicNetworkAccess
      networkAcls: {
        defaultAction: publicNetworkAccess == 'Enabled' ? 'Allow' : 'Deny'
      }
    }
  }
]

// one after the other: an account does one such operation at a time
@batchSize(1)
resource modelDeployment 'Microsoft.CognitiveServices/accounts/deployments@2025-06-01' = [
  for item in deployments: {
    parent: account[item.account]
    name: item.deployment.name
    sku: {
      name: item.deployment.?sku ?? 'GlobalStandard'
      capacity: item.deployment.capacity
    }
    properties: {
      model: {
        format: 'OpenAI'
        name: item.deployment.model
        version: item.deployment.version
      }
      // another version has other prices: whoever bills decides when
      versionUpgradeOption: 'OnceCurrentVersionExpired'
    }
  }
]

resource gatewayCalls 'Microsoft.Authorization/roleAssignments@2022-04-01' = [
  for (item, i) in accounts: {
    scope: account[i]
    name: guid(account[i].id, gatewayPrincipalId, roles.cognitiveServicesOpenAiUser)
    properties: {
      principalId: gatewayPrincipalId
      principalType: 'ServicePrincipal'
      roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.cognitiveServicesOpenAiUser)
    }
  }
]

resource logs 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = [
  for (item, i) in accounts: {
    scope: account[i]
    name: 'log-analytics'
    properties: {
      workspaceId: logAnalyticsWorkspaceId
      logs: [{ category: 'Audit', enabled: true }]
      metrics: [{ category: 'AllMetrics', enabled: true }]
    }
  }
]

@description('Names of the accounts.')
output names array = [for (item, i) in accounts: account[i].name]

@description('Resource ids of the accounts.')
output ids array = [for (item, i) in accounts: account[i].id]

@description('Addresses of the accounts.')
output endpoints array = [for (item, i) in accounts: account[i].properties.endpoint]
