// An Azure OpenAI account that is there already: API Management gets its role on it, nothing else is changed.

import { roles } from 'roles.bicep'

@description('Name of the account.')
param name string

@description('Object id of API Management\'s identity.')
param gatewayPrincipalId string

resource account 'Microsoft.CognitiveServices/accounts@2025-06-01' existing = {
  name: name
}

resource gatewayCalls 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: account
  name: guid(account.id, gatewayPrincipalId, roles.cognitiveServicesOpenAiUser)
  properties: {
    principalId: gatewayPrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.cognitiveServicesOpenAiUser)
  }
}

@description('Name of the account.')
output name string = account.name

@description('Resource id of the account.')
output id string = account.id

@description('Address of the account.')
output endpoint string = account.properties.endpoint
