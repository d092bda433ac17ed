// Azure Database for PostgreSQL flexible server: where Dagster keeps its runs, events, cursors and ticks. The bills are not in it.
// Password sign-in is off: the pipeline's identity is the administrator of this server, which serves Dagster alone, and signs in with tokens.

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Name of the server: lower-case letters, digits and hyphens, unique in Azure.')
@minLength(3)
@maxLength(63)
param name string

@description('Name of the database that Dagster makes its tables in.')
param databaseName string = 'dagster'

@description('Object id of the identity that Dagster runs as.')
param identityPrincipalId string

@description('Name of that identity: it is its user name in PostgreSQL.')
param identityName string

@description('Size of the server. The smallest burstable one carries Dagster for one pipeline.')
param skuName string = 'Standard_B1ms'

@description('Tier that the size belongs to.')
@allowed(['Burstable', 'GeneralPurpose', 'MemoryOptimized'])
param skuTier string = 'Burstable'

@description('GiB of storage; it grows by itself.')
param storageSizeGB int = 32

@description('Days that backups are kept.')
@minValue(7)
@maxValue(35)
param backupRetentionDays int = 14

@description('Subnet delegated to Microsoft.DBforPostgreSQL/flexibleServers: the server is then private for ever. Blank: public, with TLS and tokens, for services in Azure only.')
param subnetId string = ''

@description('Private DNS zone (privatelink.postgres.database.azure.com or one that ends in postgres.database.azure.com); needed with a subnet.')
param privateDnsZoneId string = ''

var private = !empty(subnetId)

resource server 'Microsoft.DBforPostgreSQL/flexibleServers@2024-08-01' = {
  name: name
  location: location
  tags: tags
  sku: {
    name: skuName
    tier: skuTier
  }
  properties: {
    version: '16'
    authConfig: {
      activeDirectoryAuth: 'Enabled'
      passwordAuth: 'Disabled'
      tenantId: tenant().tenantId
    }
    storage: {
      storageSizeGB: storageSizeGB
      autoGrow: 'Enabled'
    }
    backup: {
      backupRetentionDays: backupRetentionDays
      geoRedundantBackup: 'Disabled'
    }
    highAvailability: {
      mode: 'Disabled'
    }
    network: private
      ? {
          delegatedSubnetResourceId: subnetId
          privateDnsZoneArmResourceId: privateDnsZoneId
        }
      : {
          publicNetworkAccess: 'Enabled'
        }
  }
}

// one after the other: a server does one such operation at a time
resource database 'Microsoft.DBforPostgreSQL/flexibleServers/databases@2024-08-01' = {
  parent: server
  name: databaseName
  properties: {
    charset: 'UTF8'
    collation: 'en_US.utf8'
  }
}

resource azureServices 'Microsoft.DBforPostgreSQL/flexibleServers/firewallRules@2024-08-01' = if (!private) {
  parent: server
  // this range means: callers inside Azure. Without a token of the administrator none of them gets in.
  name: 'AllowAllAzureServices'
  properties: {
    startIpAddress: '0.0.0.0'
    endIpAddress: '0.0.0.0'
  }
  dependsOn: [database]
}

resource administrator 'Microsoft.DBforPostgreSQL/flexibleServers/administrators@2024-08-01' = {
  parent: server
  name: identityPrincipalId
  properties: {
    principalName: identityName
    principalType: 'ServicePrincipal'
    tenantId: tenant().tenantId
  }
  dependsOn: [database, azureServices]
}

@description('Name of the server.')
output name string = server.name

@description('Resource id of the server.')
output id string = server.id

@description('Host name of the server.')
output hostName string = server.properties.fullyQualifiedDomainName

@description('Name of the database.')
output databaseName string = database.name

@description('User name that the identity signs in with.')
output userName string = administrator.properties.principalName
