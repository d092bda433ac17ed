// An API Management service that is there already. It needs a system-assigned identity: without one this module fails, and nothing was changed.

@description('Name of the service.')
param name string

resource service 'Microsoft.ApiManagement/service@2024-05-01' existing = {
  name: name
}

@description('Name of the service.')
output name string = service.name

@description('Resource id of the service.')
output id string = service.id

@description('Object id of the service\'s own identity.')
output principalId string = service.identity.principalId

@description('Host name that callers use without an application gateway.')
output hostName string = replace(service.properties.gatewayUrl, 'https://', '')
