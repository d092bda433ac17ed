// Log Analytics, and Application Insights that keeps its data there. Both take only Entra ID tokens.

import { roles } from 'roles.bicep'

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Names begin with it.')
param namePrefix string

@description('Days that logs are kept. The first 31 are in the price of the data.')
@minValue(30)
@maxValue(730)
param retentionDays int = 31

@description('GB a day after which Log Analytics takes no more until the next day; -1: no limit.')
param dailyQuotaGb int = -1

@description('Object ids of the identities that send telemetry.')
param publisherPrincipalIds array

resource workspace 'Microsoft.OperationalInsights/workspaces@2025-02-01' = {
  name: '${namePrefix}-logs'
  location: location
  tags: tags
  properties: {
    sku: {
      name: 'PerGB2018'
    }
    retentionInDays: retentionDays
    workspaceCapping: {
      dailyQuotaGb: dailyQuotaGb
    }
    features: {
      disableLocalAuth: true
      enableLogAccessUsingOnlyResourcePermissions: true
    }
  }
}

resource applicationInsights 'Microsoft.Insights/components@2020-02-02' = {
  name: '${namePrefix}-insights'
  location: location
  tags: tags
  kind: 'web'
  properties: {
    Application_Type: 'web'
    WorkspaceResourceId: workspace.id
    IngestionMode: 'LogAnalytics'
    DisableLocalAuth: true
  }
}

resource publish 'Microsoft.Authorization/roleAssignments@2022-04-01' = [
  for principalId in publisherPrincipalIds: {
    scope: applicationInsights
    name: guid(applicationInsights.id, principalId, roles.monitoringMetricsPublisher)
    properties: {
      principalId: principalId
      principalType: 'ServicePrincipal'
      roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.monitoringMetricsPublisher)
    }
  }
]

@description('Name of the Log Analytics workspace.')
output workspaceName string = workspace.name

@description('Resource id of the Log Analytics workspace.')
output workspaceId string = workspace.id

@description('Name of the Application Insights component.')
output name string = applicationInsights.name

@description('Resource id of the Application Insights component.')
output id string = applicationInsights.id

@description('APPLICATIONINSIGHTS_CONNECTION_STRING: where to send, not a right to send.')
output connectionString string = applicationInsights.properties.ConnectionString
