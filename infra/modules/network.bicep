// The virtual network: a subnet for each part that needs one, a network security group for each subnet, and the private DNS zones.

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Names begin with it.')
param namePrefix string

@description('Address space of the network: a /21 or larger, which the subnets are cut from.')
param addressPrefix string = '10.64.0.0/21'

@description('Resource id of a virtual network that is there already: the subnets are those of existingSubnetIds. Blank: make one.')
param existingVirtualNetworkId string = ''

// infra/README.md says what each must be delegated to
@description('Subnets of that network: { applicationGateway, apiManagement, containerApps, functions, privateEndpoints, postgresql }.')
param existingSubnetIds object = {}

@description('Private endpoints are made: their DNS zones are needed.')
param privateEndpoints bool

@description('Resource group that has the private DNS zones already, such as that of a hub network. Blank: make them here.')
param privateDnsZonesResourceGroupId string = ''

var create = empty(existingVirtualNetworkId)
var createZones = privateEndpoints && empty(privateDnsZonesResourceGroupId)

// what is reached by a private endpoint, and PostgreSQL, which is in the network itself
var zones = {
  blob: 'privatelink.blob.${az.environment().suffixes.storage}'
  vault: 'privatelink.vaultcore.azure.net'
  cosmos: 'privatelink.documents.azure.com'
  eventHubs: 'privatelink.servicebus.windows.net'
  openAi: 'privatelink.openai.azure.com'
  apiManagement: 'privatelink.azure-api.net'
  registry: 'privatelink.azurecr.io'
  postgresql: 'privatelink.postgres.database.azure.com'
}

var postgresqlDelegation = 'Microsoft.DBforPostgreSQL/flexibleServers'

// A /23 and two /24s, then /26s in the rest. The delegations are what Azure asks for.
var subnets = [
  { key: 'containerApps', name: 'container-apps', prefix: cidrSubnet(addressPrefix, 23, 0), delegation: 'Microsoft.App/environments', rules: [] }
  { key: 'applicationGateway', name: 'application-gateway', prefix: cidrSubnet(addressPrefix, 24, 2), delegation: '', rules: gatewayRules }
  { key: 'privateEndpoints', name: 'private-endpoints', prefix: cidrSubnet(addressPrefix, 24, 3), delegation: '', rules: [] }
  { key: 'functions', name: 'functions', prefix: cidrSubnet(addressPrefix, 26, 16), delegation: 'Microsoft.App/environments', rules: [] }
  { key: 'apiManagement', name: 'api-management', prefix: cidrSubnet(addressPrefix, 26, 17), delegation: 'Microsoft.Web/serverFarms', rules: [] }
  { key: 'postgresql', name: 'postgresql', prefix: cidrSubnet(addressPrefix, 26, 18), delegation: postgresqlDelegation, rules: [] }
]

var gatewayRules = [
  {
    name: 'clients'
    properties: {
      direction: 'Inbound'
      access: 'Allow'
      priority: 100
      protocol: 'Tcp'
      sourceAddressPrefix: 'Internet'
      sourcePortRange: '*'
      destinationAddressPrefix: '*'
      destinationPortRanges: ['80', '443']
    }
  }
  {
    // without it an application gateway of the v2 tiers reports itself as unhealthy
    name: 'gateway-manager'
    properties: {
      direction: 'Inbound'
      access: 'Allow'
      priority: 110
      protocol: 'Tcp'
      sourceAddressPrefix: 'GatewayManager'
      sourcePortRange: '*'
      destinationAddressPrefix: '*'
      destinationPortRange: '65200-65535'
    }
  }
]

resource securityGroup 'Microsoft.Network/networkSecurityGroups@2024-07-01' = [
  for subnet in subnets: if (create) {
    name: '${namePrefix}-${subnet.name}'
    location: location
    tags: tags
    properties: {
      securityRules: subnet.rules
    }
  }
]

resource network 'Microsoft.Network/virtualNetworks@2024-07-01' = if (create) {
  name: '${namePrefix}-network'
  location: location
  tags: tags
  properties: {
    addressSpace: {
      addressPrefixes: [addressPrefix]
    }
    subnets: [
      for (subnet, i) in subnets: {
        name: subnet.name
        properties: {
          addressPrefix: subnet.prefix
          networkSecurityGroup: {
            id: securityGroup[i].id
          }
          delegations: empty(subnet.delegation)
            ? []
            : [
                {
                  name: 'delegation'
                  properties: {
                    serviceName: subnet.delegation
                  }
                }
              ]
        }
      }
    ]
  }
}

resource zone 'Microsoft.Network/privateDnsZones@2024-06-01' = [
  for item in items(zones): if (createZones) {
    name: item.value
    location: 'global'
    tags: tags
  }
]

resource link 'Microsoft.Network/privateDnsZones/virtualNetworkLinks@2024-06-01' = [
  for (item, i) in items(zones): if (createZones) {
    parent: zone[i]
    name: '${namePrefix}-network'
    location: 'global'
    tags: tags
    properties: {
      registrationEnabled: false
      virtualNetwork: {
        id: create ? network.id : existingVirtualNetworkId
      }
    }
  }
]

var zonesGroupId = empty(privateDnsZonesResourceGroupId) ? resourceGroup().id : privateDnsZonesResourceGroupId
var zonesId = '${zonesGroupId}/providers/Microsoft.Network/privateDnsZones'

@description('Name of the virtual network.')
output name string = create ? network.name : last(split(existingVirtualNetworkId, '/'))

@description('Resource id of the virtual network.')
output id string = create ? network.id : existingVirtualNetworkId

@description('Resource ids of the subnets, by part.')
output subnetIds object = create ? toObject(subnets, subnet => subnet.key, subnet => '${network.id}/subnets/${subnet.name}') : existingSubnetIds

@description('Resource ids of the private DNS zones, by service.')
output zoneIds object = mapValues(zones, zoneName => privateEndpoints ? '${zonesId}/${zoneName}' : '')
