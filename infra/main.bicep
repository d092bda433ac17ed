// The whole deployment, from the gateway to Power BI's sources. infra/README.md has the picture, the parameters by task and the table of roles.

targetScope = 'subscription'

metadata description = 'Azure OpenAI behind API Management, its usage through Event Hubs Capture into exact bills.'

// ---- what it is called and where it is

@description('Name of the environment, as azd calls it. Resource group and globally unique names are made from it.')
@minLength(1)
@maxLength(64)
param environmentName string = 'aoai-usage'

@description('Region of everything. Event Hubs must be in the region of API Management.')
param location string

@description('Resource group that is made. Blank: rg-<environmentName>.')
param resourceGroupName string = ''

@description('Names of resources begin with it: lower-case letters, digits and hyphens, first a letter, last no hyphen.')
@minLength(3)
@maxLength(22)
param namePrefix string = 'aoai-usage'

@description('Tags of every resource, beside azd-env-name.')
param tags object = {}

@description('Object id of the person or group that uploads reference files and looks around in storage. Blank: nobody.')
param operatorPrincipalId string = ''

@description('What the operator is.')
@allowed(['User', 'Group', 'ServicePrincipal'])
param operatorPrincipalType string = 'User'

// ---- the gateway

@description('API Management service that is there already, with a system-assigned identity. Blank: one is made.')
param existingApiManagementName string = ''

@description('Its resource group in this subscription. Blank: the one of this deployment.')
param existingApiManagementResourceGroup string = ''

@description('Tier of the service that is made. Developer has no SLA; with privateEndpoints it must be StandardV2 or PremiumV2.')
@allowed(['BasicV2', 'StandardV2', 'PremiumV2', 'Developer'])
param apiManagementSku string = 'BasicV2'

@description('Its scale units.')
@minValue(1)
@maxValue(30)
param apiManagementCapacity int = 1

@description('API Management is reachable from the Internet. false needs privateEndpoints, and Azure refuses it in the first deployment.')
param apiManagementPublicAccess bool = true

@description('Address that Azure sends notices about API Management to.')
param publisherEmail string

@description('Name of the organisation, for the developer portal.')
param publisherName string = 'AI platform'

@description('Path of the API on the gateway.')
param apiPath string = 'openai'

@description('Callers: [{ name, displayName }]. Each gets a subscription with keys; its name is the subscription_id in cost_centers.csv.')
param callers array = []

@description('Percent of the calls that Application Insights traces. Bills have every call, whatever this says.')
@minValue(0)
@maxValue(100)
param traceSamplingPercentage int = 100

@description('GatewayLogs and GatewayLlmLogs go to the hub: the tokens of streamed calls. Leaves shared access keys of the namespace on.')
param azureMonitorSends bool = true

@description('GatewayLogs and GatewayLlmLogs go to Log Analytics too, to be searched. The bills do not need it, and it costs by the GB.')
param gatewayLogsInLogAnalytics bool = true

@description('Prompts and answers are in the gateway\'s logs. A decision about privacy; no bill needs it.')
param logPrompts bool = false

@description('An application gateway with a web application firewall in front.')
param applicationGateway bool = false

@description('Host name that callers use; the one of the certificate.')
param gatewayHostName string = ''

@description('Its certificate in this deployment\'s vault: https://<vault>.vault.azure.net/secrets/<name>. Blank: callers are only redirected.')
param gatewayCertificateSecretId string = ''

@description('Detection only logs what Prevention blocks.')
@allowed(['Prevention', 'Detection'])
param firewallMode string = 'Prevention'

// ---- Azure OpenAI

@description('Resource ids of Azure OpenAI accounts that are there already. Empty: those of openAiAccounts are made.')
param existingOpenAiAccountIds array = []

// models come and go: `az cognitiveservices model list --location <region>` has those of today
@description('Accounts that are made: [{ name, location, deployments: [{ name, model, version, sku, capacity }] }].')
param openAiAccounts array = [
  {
    name: 'openai'
    deployments: [
      { name: 'gpt-5-mini', model: 'gpt-5-mini', version: '2025-08-07', sku: 'GlobalStandard', capacity: 50 }
      { name: 'text-embedding-3-small', model: 'text-embedding-3-small', version: '1', sku: 'GlobalStandard', capacity: 50 }
    ]
  }
]

// ---- network

@description('Data services and API Management get private endpoints, PostgreSQL and the apps are in the network, public access is off.')
param privateEndpoints bool = false

@description('Address space of the network that is made: a /21 or larger.')
param networkAddressPrefix string = '10.64.0.0/21'

@description('Resource id of a virtual network that is there already. Blank: one is made if something needs it.')
param existingVirtualNetworkId string = ''

@description('Subnets of that network: { applicationGateway, apiManagement, containerApps, functions, privateEndpoints, postgresql }.')
param existingSubnetIds object = {}

@description('Resource id of the resource group that has the private DNS zones already. Blank: they are made.')
param privateDnsZonesResourceGroupId string = ''

@description('With privateEndpoints: the web interface is reached from inside the network only.')
param webInterfaceInternal bool = false

@description('The container registry can be reached from the Internet, which builds by `az acr build` need. false needs privateEndpoints.')
param registryPublicAccess bool = true

// ---- events, storage, documents

@description('Event Hubs writes the capture files. false: the pipeline drains the hub every five minutes.')
param capture bool = true

@description('Minutes until a capture file is written at the latest.')
@minValue(1)
@maxValue(15)
param captureMinutes int = 5

@description('Partitions of the hub. They cannot be changed later.')
@minValue(1)
@maxValue(32)
param partitionCount int = 4

@description('Throughput units to begin with: 1 MB/s or 1,000 events/s each. Every deployment goes back to them.')
@minValue(1)
@maxValue(40)
param throughputUnits int = 1

@description('Throughput units that auto-inflate goes up to.')
@minValue(1)
@maxValue(40)
param maximumThroughputUnits int = 4

@description('Redundancy of the storage account.')
@allowed(['Standard_LRS', 'Standard_ZRS', 'Standard_GRS', 'Standard_GZRS', 'Standard_RAGRS', 'Standard_RAGZRS'])
param storageSku string = 'Standard_ZRS'

@description('Days that capture files are kept; 0: for ever. A bill can be verified and made again as long as they are there.')
@minValue(0)
param captureRetentionDays int = 730

@description('Object ids of people or groups that read the lake, such as with Power BI. They see all cost centres.')
param lakeReaderPrincipalIds array = []

@description('Request units per second that each Cosmos DB container scales up to.')
@minValue(1000)
param cosmosMaxThroughput int = 1000

@description('Every request of the last 90 days is a document in Cosmos DB too.')
param cosmosUsage bool = false

@description('Object ids of people or groups that read the Cosmos DB documents.')
param cosmosReaderPrincipalIds array = []

// ---- Dagster

@description('The image of the pipeline. Blank in the first deployment: the apps are not made as long as there is no image.')
param image string = ''

@description('Client id of the app registration that people sign in to. Blank: the web interface is not reachable.')
param authClientId string = ''

@description('Object ids of the Entra ID groups that may sign in. Empty: everybody whom the app registration lets in.')
param allowedGroups array = []

@description('Cores of the code location, which executes the runs.')
@allowed(['0.5', '1.0', '2.0', '4.0'])
param codeLocationCpu string = '2.0'

@description('Its memory: 2 Gi per core.')
@allowed(['1Gi', '2Gi', '4Gi', '8Gi'])
param codeLocationMemory string = '4Gi'

@description('Size of the PostgreSQL server.')
param postgresqlSku string = 'Standard_B1ms'

@description('Tier that the size belongs to.')
@allowed(['Burstable', 'GeneralPurpose', 'MemoryOptimized'])
param postgresqlTier string = 'Burstable'

@description('Further settings of docs/settings.md, by name; they win over those that this deployment makes. No secrets.')
param pipelineSettings object = {}

// ---- who is told what

@description('The Function App that hands notifications to Teams and e-mail, and tells Dagster about new capture files.')
param functionApp bool = true

@description('Its code is deployed. false in the first deployment: Event Grid takes a function as a target only once it is there.')
param functionAppCodeDeployed bool = false

@description('URL of a Teams workflow that posts notifications. Blank: nothing is posted.')
@secure()
param teamsWebhookUrl string = ''

@description('Addresses that get every notification by mail, separated by commas. Blank: no mail.')
param notificationMailTo string = ''

@description('Addresses that the alerts of Azure Monitor go to.')
param alertEmails string[] = []

@description('Key that the pipeline shows to the notifications\' receiver; made anew by each deployment.')
@secure()
param receiverKey string = newGuid()

@description('Days that logs are kept.')
@minValue(30)
@maxValue(730)
param logRetentionDays int = 31

var allTags = union({ 'azd-env-name': environmentName }, tags)
var groupName = empty(resourceGroupName) ? 'rg-${environmentName}' : resourceGroupName
var suffix = uniqueString(subscription().subscriptionId, environmentName, location)
var uniqueName = '${namePrefix}-${suffix}'
var compactPrefix = toLower(replace(namePrefix, '-', ''))
var makeApiManagement = empty(existingApiManagementName)
var makeOpenAi = empty(existingOpenAiAccountIds)
var needsNetwork = applicationGateway || privateEndpoints
var registryPrivate = privateEndpoints && !registryPublicAccess
var publicAccess = privateEndpoints ? 'Disabled' : 'Enabled'
var apiManagementGroup = makeApiManagement || empty(existingApiManagementResourceGroup) ? groupName : existingApiManagementResourceGroup

resource group 'Microsoft.Resources/resourceGroups@2025-04-01' = {
  name: groupName
  location: location
  tags: allTags
}

// ---- identities: the pipeline's and the application gateway's. API Management, Event Hubs and the Function App bring their own.

module pipelineIdentity 'modules/identity.bicep' = {
  name: 'pipeline-identity'
  scope: group
  params: {
    location: location
    tags: allTags
    name: '${namePrefix}-pipeline'
  }
}

module gatewayIdentity 'modules/identity.bicep' = if (applicationGateway) {
  name: 'gateway-identity'
  scope: group
  params: {
    location: location
    tags: allTags
    name: '${namePrefix}-gateway'
  }
}

module network 'modules/network.bicep' = if (needsNetwork) {
  name: 'network'
  scope: group
  params: {
    location: location
    tags: allTags
    namePrefix: namePrefix
    addressPrefix: networkAddressPrefix
    existingVirtualNetworkId: existingVirtualNetworkId
    existingSubnetIds: existingSubnetIds
    privateEndpoints: privateEndpoints
    privateDnsZonesResourceGroupId: privateDnsZonesResourceGroupId
  }
}

// ---- the gateway

module newApiManagement 'modules/api-management.bicep' = if (makeApiManagement) {
  name: 'api-management'
  scope: group
  params: {
    location: location
    tags: allTags
    name: uniqueName
    skuName: apiManagementSku
    capacity: apiManagementCapacity
    publisherEmail: publisherEmail
    publisherName: publisherName
    subnetId: privateEndpoints ? network!.outputs.subnetIds.apiManagement : ''
    publicNetworkAccess: apiManagementPublicAccess ? 'Enabled' : 'Disabled'
  }
}

module existingApiManagement 'modules/api-management-existing.bicep' = if (!makeApiManagement) {
  name: 'api-management-existing'
  scope: resourceGroup(apiManagementGroup)
  params: {
    name: existingApiManagementName
  }
}

var apiManagementName = makeApiManagement ? newApiManagement!.outputs.name : existingApiManagement!.outputs.name
var apiManagementId = makeApiManagement ? newApiManagement!.outputs.id : existingApiManagement!.outputs.id
var apiManagementPrincipalId = makeApiManagement ? newApiManagement!.outputs.principalId : existingApiManagement!.outputs.principalId
var apiManagementHostName = makeApiManagement ? newApiManagement!.outputs.hostName : existingApiManagement!.outputs.hostName

module monitoring 'modules/monitoring.bicep' = {
  name: 'monitoring'
  scope: group
  params: {
    location: location
    tags: allTags
    namePrefix: namePrefix
    retentionDays: logRetentionDays
    publisherPrincipalIds: [pipelineIdentity.outputs.principalId, apiManagementPrincipalId]
  }
}

module azureOpenAi 'modules/azure-openai.bicep' = if (makeOpenAi) {
  name: 'azure-openai'
  scope: group
  params: {
    location: location
    tags: allTags
    namePrefix: uniqueName
    accounts: openAiAccounts
    publicNetworkAccess: publicAccess
    gatewayPrincipalId: apiManagementPrincipalId
    logAnalyticsWorkspaceId: monitoring.outputs.workspaceId
  }
}

module existingOpenAi 'modules/azure-openai-existing.bicep' = [
  for (id, i) in existingOpenAiAccountIds: {
    name: 'azure-openai-existing-${i}'
    scope: resourceGroup(split(id, '/')[2], split(id, '/')[4])
    params: {
      name: last(split(id, '/'))
      gatewayPrincipalId: apiManagementPrincipalId
    }
  }
]

module api 'modules/api-management-api.bicep' = {
  name: 'api-management-api'
  scope: resourceGroup(apiManagementGroup)
  params: {
    serviceName: apiManagementName
    apiPath: apiPath
    newOpenAiEndpoints: makeOpenAi ? azureOpenAi!.outputs.endpoints : []
    existingOpenAiEndpoints: [for (id, i) in existingOpenAiAccountIds: existingOpenAi[i].outputs.endpoint]
    subscriptions: callers
    eventHubsHostName: eventHubs.outputs.hostName
    usageHubName: eventHubs.outputs.usageHubName
    azureMonitorRuleId: eventHubs.outputs.azureMonitorRuleId
    logAnalyticsWorkspaceId: gatewayLogsInLogAnalytics ? monitoring.outputs.workspaceId : ''
    applicationInsightsName: monitoring.outputs.name
    applicationInsightsId: monitoring.outputs.id
    applicationInsightsConnectionString: monitoring.outputs.connectionString
    traceSamplingPercentage: traceSamplingPercentage
    logPrompts: logPrompts
  }
}

module firewalledGateway 'modules/application-gateway.bicep' = if (applicationGateway) {
  name: 'application-gateway'
  scope: group
  params: {
    location: location
    tags: allTags
    namePrefix: namePrefix
    domainNameLabel: uniqueName
    subnetId: network!.outputs.subnetIds.applicationGateway
    apiManagementHostName: apiManagementHostName
    hostName: gatewayHostName
    certificateSecretId: gatewayCertificateSecretId
    identityId: gatewayIdentity!.outputs.id
    firewallMode: firewallMode
    logAnalyticsWorkspaceId: monitoring.outputs.workspaceId
  }
  // it reads its certificate while it is made
  dependsOn: [keyVault, privateEndpoint]
}

var gatewayHost = applicationGateway ? firewalledGateway!.outputs.hostName : apiManagementHostName

// ---- events, storage, documents

module storage 'modules/storage.bicep' = {
  name: 'storage'
  scope: group
  params: {
    location: location
    tags: allTags
    name: '${take(compactPrefix, 11)}${suffix}'
    skuName: storageSku
    private: privateEndpoints
    captureRetentionDays: captureRetentionDays
    pipelinePrincipalId: pipelineIdentity.outputs.principalId
    drain: !capture
    operatorPrincipalId: operatorPrincipalId
    operatorPrincipalType: operatorPrincipalType
    lakeReaderPrincipalIds: lakeReaderPrincipalIds
  }
}

module eventHubs 'modules/event-hubs.bicep' = {
  name: 'event-hubs'
  scope: group
  params: {
    location: location
    tags: allTags
    name: uniqueName
    throughputUnits: throughputUnits
    maximumThroughputUnits: maximumThroughputUnits
    partitionCount: partitionCount
    captureEnabled: capture
    captureMinutes: captureMinutes
    storageAccountName: storage.outputs.name
    captureContainerName: storage.outputs.captureContainerName
    azureMonitorSends: azureMonitorSends
    private: privateEndpoints
    gatewayPrincipalId: apiManagementPrincipalId
    pipelinePrincipalId: pipelineIdentity.outputs.principalId
    operatorPrincipalId: operatorPrincipalId
    operatorPrincipalType: operatorPrincipalType
    logAnalyticsWorkspaceId: monitoring.outputs.workspaceId
  }
}

module cosmosDb 'modules/cosmos-db.bicep' = {
  name: 'cosmos-db'
  scope: group
  params: {
    location: location
    tags: allTags
    name: uniqueName
    autoscaleMaxThroughput: cosmosMaxThroughput
    publicNetworkAccess: publicAccess
    pipelinePrincipalId: pipelineIdentity.outputs.principalId
    readerPrincipalIds: cosmosReaderPrincipalIds
  }
}

var gatewayPrincipalIds = applicationGateway ? [gatewayIdentity!.outputs.principalId] : []

module keyVault 'modules/key-vault.bicep' = {
  name: 'key-vault'
  scope: group
  params: {
    location: location
    tags: allTags
    name: '${take(compactPrefix, 10)}-${suffix}'
    publicNetworkAccess: publicAccess
    secretsUserPrincipalIds: concat([pipelineIdentity.outputs.principalId], gatewayPrincipalIds)
    logAnalyticsWorkspaceId: monitoring.outputs.workspaceId
  }
}

// ---- private endpoints

var privateServices = concat(
  [
    { key: 'blob', groupId: 'blob' }
    { key: 'vault', groupId: 'vault' }
    { key: 'cosmos', groupId: 'Sql' }
    { key: 'eventHubs', groupId: 'namespace' }
  ],
  makeApiManagement ? [{ key: 'apiManagement', groupId: 'Gateway' }] : [],
  registryPrivate ? [{ key: 'registry', groupId: 'registry' }] : []
)

var privateServiceIds = {
  blob: storage.outputs.id
  vault: keyVault.outputs.id
  cosmos: cosmosDb.outputs.id
  eventHubs: eventHubs.outputs.id
  apiManagement: apiManagementId
  registry: registry.outputs.id
}

module privateEndpoint 'modules/private-endpoint.bicep' = [
  for service in privateServices: if (privateEndpoints) {
    name: 'private-endpoint-${service.key}'
    scope: group
    params: {
      location: location
      tags: allTags
      name: '${namePrefix}-${toLower(service.key)}'
      subnetId: network!.outputs.subnetIds.privateEndpoints
      serviceId: privateServiceIds[service.key]
      groupId: service.groupId
      privateDnsZoneId: network!.outputs.zoneIds[service.key]
    }
  }
]

module openAiPrivateEndpoint 'modules/private-endpoint.bicep' = [
  for (account, i) in openAiAccounts: if (privateEndpoints && makeOpenAi) {
    name: 'private-endpoint-${account.name}'
    scope: group
    params: {
      location: location
      tags: allTags
      name: '${namePrefix}-${account.name}'
      subnetId: network!.outputs.subnetIds.privateEndpoints
      serviceId: azureOpenAi!.outputs.ids[i]
      groupId: 'account'
      privateDnsZoneId: network!.outputs.zoneIds.openAi
    }
  }
]

// ---- Dagster

module registry 'modules/container-registry.bicep' = {
  name: 'container-registry'
  scope: group
  params: {
    location: location
    tags: allTags
    name: '${compactPrefix}${suffix}'
    sku: registryPrivate ? 'Premium' : 'Basic'
    publicNetworkAccess: registryPrivate ? 'Disabled' : 'Enabled'
    pullPrincipalId: pipelineIdentity.outputs.principalId
  }
}

module postgresql 'modules/postgresql.bicep' = {
  name: 'postgresql'
  scope: group
  params: {
    location: location
    tags: allTags
    name: uniqueName
    identityPrincipalId: pipelineIdentity.outputs.principalId
    identityName: pipelineIdentity.outputs.name
    skuName: postgresqlSku
    skuTier: postgresqlTier
    subnetId: privateEndpoints ? network!.outputs.subnetIds.postgresql : ''
    privateDnsZoneId: privateEndpoints ? network!.outputs.zoneIds.postgresql : ''
  }
}

module containerAppsEnvironment 'modules/container-apps-environment.bicep' = {
  name: 'container-apps-environment'
  scope: group
  params: {
    location: location
    tags: allTags
    namePrefix: namePrefix
    logAnalyticsWorkspaceId: monitoring.outputs.workspaceId
    infrastructureSubnetId: privateEndpoints ? network!.outputs.subnetIds.containerApps : ''
    internal: privateEndpoints && webInterfaceInternal
  }
}

var madeSettings = {
  AOAI_CAPTURE_URL: storage.outputs.captureUrl
  AOAI_LAKE_URL: storage.outputs.lakeUrl
  AOAI_REFERENCE_DIR: storage.outputs.referenceUrl
  AOAI_AUTOMATION: 'running'
  AOAI_COSMOS_ENDPOINT: cosmosDb.outputs.endpoint
  AOAI_COSMOS_DATABASE: cosmosDb.outputs.databaseName
  AOAI_COSMOS_USAGE: cosmosUsage ? 'on' : 'off'
  AOAI_EVENT_HUB_NAMESPACE: eventHubs.outputs.hostName
  AOAI_EVENT_HUB_NAME: eventHubs.outputs.usageHubName
  AOAI_EVENT_HUB_CONSUMER_GROUP: eventHubs.outputs.consumerGroupName
  AOAI_CAPTURE_MINUTES: string(captureMinutes)
  AOAI_DRAIN: capture ? 'off' : 'on'
  AOAI_NOTIFY_EVENT_HUB: eventHubs.outputs.notificationsHubName
  AOAI_UI_URL: containerAppsEnvironment.outputs.webserverUrl
  APPLICATIONINSIGHTS_CONNECTION_STRING: monitoring.outputs.connectionString
}

var webhookSecretUri = functionApp ? functions!.outputs.webhookUrlSecretUri : ''
var functionsCaller = {
  clientId: functionApp ? functions!.outputs.identityClientId : ''
  principalId: functionApp ? functions!.outputs.identityPrincipalId : ''
}

module containerApps 'modules/container-apps.bicep' = {
  name: 'container-apps'
  scope: group
  params: {
    location: location
    tags: allTags
    namePrefix: namePrefix
    environmentId: containerAppsEnvironment.outputs.id
    image: image
    registryServer: registry.outputs.loginServer
    identityId: pipelineIdentity.outputs.id
    identityClientId: pipelineIdentity.outputs.clientId
    postgresHostName: postgresql.outputs.hostName
    postgresDatabaseName: postgresql.outputs.databaseName
    postgresUserName: postgresql.outputs.userName
    settings: union(madeSettings, pipelineSettings)
    keyVaultSecrets: functionApp ? { AOAI_NOTIFY_WEBHOOK_URL: webhookSecretUri } : {}
    authClientId: authClientId
    allowedGroups: allowedGroups
    callers: functionApp ? [functionsCaller] : []
    codeLocationCpu: codeLocationCpu
    codeLocationMemory: codeLocationMemory
  }
  dependsOn: [keyVault, privateEndpoint]
}

// ---- who is told what

module functions 'modules/functions.bicep' = if (functionApp) {
  name: 'functions'
  scope: group
  params: {
    location: location
    tags: allTags
    name: '${namePrefix}-functions-${suffix}'
    storageAccountName: '${take(compactPrefix, 9)}fn${suffix}'
    keyVaultName: keyVault.outputs.name
    applicationInsightsName: monitoring.outputs.name
    eventHubsNamespaceName: eventHubs.outputs.name
    eventHubName: eventHubs.outputs.usageHubName
    dagsterUrl: empty(authClientId) ? '' : containerAppsEnvironment.outputs.webserverUrl
    dagsterAudience: empty(authClientId) ? '' : 'api://${authClientId}'
    teamsWebhookUrl: teamsWebhookUrl
    mailTo: notificationMailTo
    receiverKey: receiverKey
    subnetId: privateEndpoints ? network!.outputs.subnetIds.functions : ''
    codeDeployed: functionAppCodeDeployed
  }
}

module workbook 'modules/workbook.bicep' = {
  name: 'workbook'
  scope: group
  params: {
    location: location
    tags: allTags
    namePrefix: namePrefix
    applicationInsightsId: monitoring.outputs.id
  }
}

module alerts 'modules/alerts.bicep' = {
  name: 'alerts'
  scope: group
  params: {
    location: location
    tags: allTags
    namePrefix: namePrefix
    applicationInsightsId: monitoring.outputs.id
    emails: alertEmails
    runbookUrl: pipelineSettings.?AOAI_RUNBOOK_URL ?? 'docs/runbook.md'
  }
}

// ---- azd keeps these in its environment; `az deployment sub show` prints them

@description('Resource group of the deployment.')
output AZURE_RESOURCE_GROUP string = group.name

@description('Name of the container registry.')
output AZURE_CONTAINER_REGISTRY_NAME string = registry.outputs.name

@description('Host name of the container registry.')
output AZURE_CONTAINER_REGISTRY_ENDPOINT string = registry.outputs.loginServer

@description('Name of the storage account.')
output AZURE_STORAGE_ACCOUNT_NAME string = storage.outputs.name

@description('Name of the Key Vault.')
output AZURE_KEY_VAULT_NAME string = keyVault.outputs.name

@description('Client id of the pipeline\'s identity.')
output AZURE_PIPELINE_CLIENT_ID string = pipelineIdentity.outputs.clientId

@description('Name of the API Management service.')
output AZURE_API_MANAGEMENT_NAME string = apiManagementName

@description('Address of the API: the endpoint of clients.')
output AOAI_GATEWAY_URL string = 'https://${gatewayHost}/${apiPath}'

@description('Where capture files are.')
output AOAI_CAPTURE_URL string = storage.outputs.captureUrl

@description('Where the lake is.')
output AOAI_LAKE_URL string = storage.outputs.lakeUrl

@description('Where reference files are uploaded to.')
output AOAI_REFERENCE_DIR string = storage.outputs.referenceUrl

@description('The Cosmos DB account.')
output AOAI_COSMOS_ENDPOINT string = cosmosDb.outputs.endpoint

@description('Its database.')
output AOAI_COSMOS_DATABASE string = cosmosDb.outputs.databaseName

@description('The Event Hubs namespace.')
output AOAI_EVENT_HUB_NAMESPACE string = eventHubs.outputs.hostName

@description('The hub that usage is sent to.')
output AOAI_EVENT_HUB_NAME string = eventHubs.outputs.usageHubName

@description('The hub that notifications are sent to.')
output AOAI_NOTIFY_EVENT_HUB string = eventHubs.outputs.notificationsHubName

@description('Address of the web interface.')
output AOAI_UI_URL string = containerAppsEnvironment.outputs.webserverUrl
