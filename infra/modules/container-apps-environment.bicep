// The Container Apps environment that Dagster's apps run in. A module of its own: others need the address of the web interface before it is there.

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Name of the environment; the names of the apps begin with it.')
@maxLength(22)
param namePrefix string

@description('Resource id of the Log Analytics workspace that gets the logs.')
param logAnalyticsWorkspaceId string

@description('Subnet (at least /27, delegated to Microsoft.App/environments) that the apps run in. Blank: none.')
param infrastructureSubnetId string = ''

@description('With a subnet: the web interface is reached from inside the network only.')
param internal bool = false

resource environment 'Microsoft.App/managedEnvironments@2025-01-01' = {
  name: namePrefix
  location: location
  tags: tags
  properties: {
    // by a diagnostic setting, which needs no key of the workspace
    appLogsConfiguration: {
      destination: 'azure-monitor'
    }
    vnetConfiguration: empty(infrastructureSubnetId)
      ? null
      : {
          infrastructureSubnetId: infrastructureSubnetId
          internal: internal
        }
    workloadProfiles: [{ name: 'Consumption', workloadProfileType: 'Consumption' }]
    zoneRedundant: false
  }
}

resource logs 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = {
  scope: environment
  name: 'log-analytics'
  properties: {
    workspaceId: logAnalyticsWorkspaceId
    logs: [{ categoryGroup: 'allLogs', enabled: true }]
  }
}

@description('Name of the environment.')
output name string = environment.name

@description('Resource id of the environment.')
output id string = environment.id

@description('Domain that the addresses of its apps end with.')
output defaultDomain string = environment.properties.defaultDomain

@description('Address of the environment\'s load balancer, for a private DNS zone of the domain.')
output staticIp string = environment.properties.staticIp

@description('Address of the web interface, AOAI_UI_URL, whether the app is there yet or not.')
output webserverUrl string = 'https://${namePrefix}-webserver.${environment.properties.defaultDomain}'
