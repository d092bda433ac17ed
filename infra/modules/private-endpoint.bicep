// A private endpoint of one service, with its name in the private DNS zone.

@description('Region of the virtual network.')
param location string

@description('Tags of every resource.')
param tags object

@description('Name of the endpoint.')
param name string

@description('Subnet that its address is in.')
param subnetId string

@description('Resource id of the service.')
param serviceId string

@description('Part of the service: blob, vault, Sql, namespace, account, Gateway, registry.')
param groupId string

@description('Resource id of the private DNS zone. Blank: somebody else registers the name, such as a policy.')
param privateDnsZoneId string = ''

resource endpoint 'Microsoft.Network/privateEndpoints@2024-07-01' = {
  name: name
  location: location
  tags: tags
  properties: {
    subnet: {
      id: subnetId
    }
    customNetworkInterfaceName: '${name}-nic'
    privateLinkServiceConnections: [
      {
        name: name
        properties: {
          privateLinkServiceId: serviceId
          groupIds: [groupId]
        }
      }
    ]
  }
}

resource dnsName 'Microsoft.Network/privateEndpoints/privateDnsZoneGroups@2024-07-01' = if (!empty(privateDnsZoneId)) {
  parent: endpoint
  name: 'default'
  properties: {
    privateDnsZoneConfigs: [
      {
        name: groupId
        properties: {
          privateDnsZoneId: privateDnsZoneId
        }
      }
    ]
  }
}

@description('Name of the endpoint.')
output name string = endpoint.name

@description('Resource id of the endpoint.')
output id string = endpoint.id
