// Key Vault with roles instead of access policies. It holds the few secrets there are: the address of the notifications' receiver, a Teams
// webhook, and the certificate of the application gateway.

import { roles } from 'roles.bicep'

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Name of the vault, unique in Azure.')
@minLength(3)
@maxLength(24)
param name string

@description('Disabled needs a private endpoint.')
@allowed(['Enabled', 'Disabled'])
param publicNetworkAccess string = 'Enabled'

@description('Days that a deleted secret can be recovered.')
@minValue(7)
@maxValue(90)
param softDeleteRetentionDays int = 90

@description('Object ids of the identities that read secrets.')
param secretsUserPrincipalIds array

@description('Log Analytics workspace that is told who read what.')
param logAnalyticsWorkspaceId string

resource vault 'Microsoft.KeyVault/vaults@2024-11-01' = {
  name: name
  location: location
  tags: tags
  properties: {
    tenantId: tenant().tenantId
    sku: {
      family: 'A'
      name: 'standard'
    }
    enableRbacAuthorization: true
    enableSoftDelete: true
    softDeleteRetentionInDays: softDeleteRetentionDays
    enablePurgeProtection: true
    publicNetworkAccess: publicNetworkAccess
    networkAcls: {
      bypass: 'AzureServices'
      defaultAction: publicNetworkAccess == 'Enabled' ? 'Allow' : 'Deny'
    }
  }
}

resource readSecrets 'Microsoft.Authorization/roleAssignments@2022-04-01' = [
  for principalId in secretsUserPrincipalIds: {
    scope: vault
    name: guid(vault.id, principalId, roles.keyVaultSecretsUser)
    properties: {
      principalId: principalId
      principalType: 'ServicePrincipal'
      roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.keyVaultSecretsUser)
    }
  }
]

resource audit 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = {
  scope: vault
  name: 'log-analytics'
  properties: {
    workspaceId: logAnalyticsWorkspaceId
    logs: [{ categoryGroup: 'audit', enabled: true }]
  }
}

@description('Name of the vault.')
output name string = vault.name

@description('Resource id of the vault.')
output id string = vault.id

@description('Address of the vault.')
output uri string = vault.properties.vaultUri
