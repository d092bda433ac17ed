// A user-assigned identity.

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Name of the identity.')
@minLength(3)
@maxLength(128)
param name string

resource identity 'Microsoft.ManagedIdentity/userAssignedIdentities@2024-11-30' = {
  name: name
  location: location
  tags: tags
}

@description('Name of the identity.')
output name string = identity.name

@description('Resource id of the identity.')
output id string = identity.id

@description('Object id that roles are assigned to.')
output principalId string = identity.properties.principalId

@description('Client id that azure-identity is told as AZURE_CLIENT_ID.')
output clientId string = identity.properties.clientId
