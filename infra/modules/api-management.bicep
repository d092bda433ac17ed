// API Management, the gateway that every call goes through and that says who used what. What it does is in api-management-api.bicep.

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Name of the service; it is in its host name and must be unique in Azure.')
@minLength(1)
@maxLength(50)
param name string

@description('Tier. Developer has no SLA. Only StandardV2 and PremiumV2 call into a virtual network here.')
@allowed(['BasicV2', 'StandardV2', 'PremiumV2', 'Developer'])
param skuName string

@description('Scale units. Developer has exactly one.')
@minValue(1)
@maxValue(30)
param capacity int = 1

@description('Address that Azure sends notices about the service to.')
param publisherEmail string

@description('Name of the organisation.')
param publisherName string

@description('Subnet delegated to Microsoft.Web/serverFarms that the gateway calls from. Blank: it calls public addresses only.')
param subnetId string = ''

@description('Disabled needs a private endpoint, and Azure lets it be set only when the service is there already: in the second deployment.')
@allowed(['Enabled', 'Disabled'])
param publicNetworkAccess string = 'Enabled'

var network = empty(subnetId)
  ? { virtualNetworkType: 'None' }
  : {
      // in the v2 tiers this is integration: calls go out through the subnet, the gateway's own address stays public
      virtualNetworkType: 'External'
      virtualNetworkConfiguration: {
        subnetResourceId: subnetId
      }
    }

resource service 'Microsoft.ApiManagement/service@2024-05-01' = {
  name: name
  location: location
  tags: tags
  sku: {
    // the type data of this version have no PremiumV2, the service has
    #disable-next-line BCP036
    name: skuName
    capacity: capacity
  }
  identity: {
    type: 'SystemAssigned'
  }
  properties: union(
    {
      publisherEmail: publisherEmail
      publisherName: publisherName
      publicNetworkAccess: publicNetworkAccess
    },
    network
  )
}

@description('Name of the service.')
output name string = service.name

@description('Resource id of the service.')
output id string = service.id

@description('Object id of the service\'s own identity.')
output principalId string = service.identity.principalId

@description('Host name that callers use without an application gateway.')
output hostName string = replace(service.properties.gatewayUrl, 'https://', '')
