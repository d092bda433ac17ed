// What API Management does for the bills: the Azure OpenAI API in front of the accounts, the policies that send usage, and the logs that have the
// tokens of streamed calls. It adds to the service and changes nothing that is there, so the service may be somebody else's.

@description('Name of the API Management service, in the resource group of this deployment.')
param serviceName string

@description('Path of the API: clients use https://<gateway>/<path> as the endpoint.')
param apiPath string = 'openai'

@description('Addresses of the Azure OpenAI accounts that this deployment made. Calls go to all accounts in turn.')
param newOpenAiEndpoints array

@description('Addresses of those that were there already.')
param existingOpenAiEndpoints array

@description('Callers: [{ name, displayName }]. Each gets a subscription of the product, with keys; the name is the subscription_id of the bills.')
param subscriptions array = []

@description('Tenant whose tokens the API accepts beside subscription keys.')
param tenantId string = tenant().tenantId

@description('Host name of the Event Hubs namespace.')
param eventHubsHostName string

@description('Name of the hub that usage is sent to.')
param usageHubName string

// blank: streamed calls have tokens in Log Analytics only, which the pipeline does not read
@description('Authorization rule of the namespace with which Azure Monitor streams GatewayLogs and GatewayLlmLogs to the hub. Blank: it does not.')
param azureMonitorRuleId string = ''

@description('Resource id of the Log Analytics workspace that gets GatewayLogs and GatewayLlmLogs. Blank: none does.')
param logAnalyticsWorkspaceId string = ''

@description('Name of the Application Insights component; the logger is named after it.')
param applicationInsightsName string

@description('Resource id of the Application Insights component.')
param applicationInsightsId string

@description('Connection string of the Application Insights component.')
param applicationInsightsConnectionString string

@description('Percent of the calls that Application Insights traces. The bills do not depend on it.')
@minValue(0)
@maxValue(100)
param traceSamplingPercentage int = 100

@description('GatewayLlmLogs carry prompts and answers. A decision about privacy: no bill needs them, and they go to Log Analytics and the hub.')
param logPrompts bool = false

@description('Bytes of a prompt or an answer that are logged, with logPrompts.')
@minValue(1)
@maxValue(262144)
param logPromptBytes int = 32768

var openAiEndpoints = concat(newOpenAiEndpoints, existingOpenAiEndpoints)
var backendPoolName = 'azure-openai'
// the fragment names it: what log-to-eventhub calls a logger may not be an expression
var usageLoggerName = 'aoai-usage'
var noBody = { headers: [], body: { bytes: 0 } }
var promptLogging = { messages: 'all', maxSizeInBytes: logPromptBytes }

// The kinds of calls that cost, by the operation ids of Azure OpenAI's own description, so that reports can name them. The rest goes by its method.
var operations = [
  { name: 'ChatCompletions_Create', method: 'POST', path: '/deployments/{deployment-id}/chat/completions' }
  { name: 'Completions_Create', method: 'POST', path: '/deployments/{deployment-id}/completions' }
  { name: 'Embeddings_Create', method: 'POST', path: '/deployments/{deployment-id}/embeddings' }
  { name: 'Transcriptions_Create', method: 'POST', path: '/deployments/{deployment-id}/audio/transcriptions' }
  { name: 'Translations_Create', method: 'POST', path: '/deployments/{deployment-id}/audio/translations' }
  { name: 'Speech_Create', method: 'POST', path: '/deployments/{deployment-id}/audio/speech' }
  { name: 'ImageGenerations_Create', method: 'POST', path: '/deployments/{deployment-id}/images/generations' }
  { name: 'ImageEdits_Create', method: 'POST', path: '/deployments/{deployment-id}/images/edits' }
  { name: 'Responses_Create', method: 'POST', path: '/responses' }
  { name: 'V1ChatCompletions_Create', method: 'POST', path: '/v1/chat/completions' }
  { name: 'V1Completions_Create', method: 'POST', path: '/v1/completions' }
  { name: 'V1Embeddings_Create', method: 'POST', path: '/v1/embeddings' }
  { name: 'V1Responses_Create', method: 'POST', path: '/v1/responses' }
  { name: 'V1ImageGenerations_Create', method: 'POST', path: '/v1/images/generations' }
  { name: 'Other_Get', method: 'GET', path: '/*' }
  { name: 'Other_Post', method: 'POST', path: '/*' }
  { name: 'Other_Delete', method: 'DELETE', path: '/*' }
]

resource service 'Microsoft.ApiManagement/service@2024-05-01' existing = {
  name: serviceName
}

resource usageLogger 'Microsoft.ApiManagement/service/loggers@2024-05-01' = {
  parent: service
  name: usageLoggerName
  properties: {
    loggerType: 'azureEventHub'
    description: 'Usage events of the policy fragments'
    credentials: {
      endpointAddress: eventHubsHostName
      name: usageHubName
      identityClientId: 'SystemAssigned'
    }
  }
}

resource insightsLogger 'Microsoft.ApiManagement/service/loggers@2024-05-01' = {
  parent: service
  name: applicationInsightsName
  properties: {
    loggerType: 'applicationInsights'
    resourceId: applicationInsightsId
    credentials: {
      connectionString: applicationInsightsConnectionString
      identityClientId: 'SystemAssigned'
    }
  }
}

resource monitorLogger 'Microsoft.ApiManagement/service/loggers@2024-05-01' = {
  parent: service
  name: 'azuremonitor'
  properties: {
    loggerType: 'azureMonitor'
    isBuffered: false
  }
}

resource backend 'Microsoft.ApiManagement/service/backends@2024-05-01' = [
  for (endpoint, i) in openAiEndpoints: {
    parent: service
    name: '${backendPoolName}-${i}'
    properties: {
      protocol: 'http'
      url: '${endpoint}${endsWith(endpoint, '/') ? '' : '/'}openai'
    }
  }
]

resource backendPool 'Microsoft.ApiManagement/service/backends@2024-05-01' = {
  parent: service
  name: backendPoolName
  // a pool has neither address nor protocol of its own, which the type data of this version asks for
  #disable-next-line BCP035
  properties: {
    type: 'Pool'
    pool: {
      services: [for (endpoint, i) in openAiEndpoints: { id: backend[i].id }]
    }
  }
}

// the names that the policies ask for
var policyValues = [
  { name: 'aoai-usage-tenant-id', value: tenantId }
  { name: 'aoai-usage-backend', value: backendPoolName }
]

resource namedValue 'Microsoft.ApiManagement/service/namedValues@2024-05-01' = [
  for item in policyValues: {
    parent: service
    name: item.name
    properties: {
      displayName: item.name
      value: item.value
      secret: false
    }
  }
]

resource requestFragment 'Microsoft.ApiManagement/service/policyFragments@2024-05-01' = {
  parent: service
  name: 'aoai-usage-request'
  properties: {
    description: 'Usage of Azure OpenAI, first half: for inbound'
    format: 'rawxml'
    value: loadTextContent('../policies/aoai-usage-request.xml')
  }
  dependsOn: [namedValue]
}

resource eventFragment 'Microsoft.ApiManagement/service/policyFragments@2024-05-01' = {
  parent: service
  name: 'aoai-usage-event'
  properties: {
    description: 'Usage of Azure OpenAI, second half: for outbound and on-error'
    format: 'rawxml'
    value: loadTextContent('../policies/aoai-usage-event.xml')
  }
  dependsOn: [namedValue, usageLogger]
}

resource api 'Microsoft.ApiManagement/service/apis@2024-05-01' = {
  parent: service
  name: 'azure-openai'
  properties: {
    displayName: 'Azure OpenAI'
    description: 'Azure OpenAI with usage sent to Event Hubs'
    type: 'http'
    path: apiPath
    protocols: ['https']
    subscriptionRequired: true
    // what the SDKs of Azure OpenAI send a key in
    subscriptionKeyParameterNames: {
      header: 'api-key'
      query: 'api-key'
    }
  }
}

// one after the other: operations of one API made at the same time conflict
@batchSize(1)
resource operation 'Microsoft.ApiManagement/service/apis/operations@2024-05-01' = [
  for item in operations: {
    parent: api
    name: item.name
    properties: {
      displayName: item.name
      method: item.method
      urlTemplate: item.path
      templateParameters: contains(item.path, '{deployment-id}') ? [{ name: 'deployment-id', type: 'string', required: true }] : []
    }
  }
]

resource apiPolicy 'Microsoft.ApiManagement/service/apis/policies@2024-05-01' = {
  parent: api
  name: 'policy'
  properties: {
    format: 'rawxml'
    value: loadTextContent('../policies/azure-openai-api.xml')
  }
  dependsOn: [requestFragment, eventFragment, backendPool, namedValue]
}

resource traces 'Microsoft.ApiManagement/service/apis/diagnostics@2024-05-01' = {
  parent: api
  name: 'applicationinsights'
  properties: {
    loggerId: insightsLogger.id
    alwaysLog: 'allErrors'
    httpCorrelationProtocol: 'W3C'
    verbosity: 'information'
    logClientIp: false
    metrics: true
    sampling: {
      samplingType: 'fixed'
      percentage: traceSamplingPercentage
    }
    frontend: { request: noBody, response: noBody }
    backend: { request: noBody, response: noBody }
  }
}

// GatewayLogs and GatewayLlmLogs of this API: every call, no bodies. largeLanguageModel came with this preview: no stable version has it, nor all
// type data.
#disable-next-line BCP081
resource gatewayLogs 'Microsoft.ApiManagement/service/apis/diagnostics@2024-06-01-preview' = {
  parent: api
  name: 'azuremonitor'
  properties: {
    loggerId: monitorLogger.id
    alwaysLog: 'allErrors'
    verbosity: 'information'
    logClientIp: false
    sampling: {
      samplingType: 'fixed'
      percentage: 100
    }
    frontend: { request: noBody, response: noBody }
    backend: { request: noBody, response: noBody }
    #disable-next-line BCP037
    largeLanguageModel: union({ logs: 'enabled' }, logPrompts ? { requests: promptLogging, responses: promptLogging } : {})
  }
}

resource product 'Microsoft.ApiManagement/service/products@2024-05-01' = {
  parent: service
  name: 'azure-openai'
  properties: {
    displayName: 'Azure OpenAI'
    description: 'Calls are billed to the cost centre of the subscription.'
    state: 'published'
    subscriptionRequired: true
    approvalRequired: true
  }
}

resource productApi 'Microsoft.ApiManagement/service/products/apis@2024-05-01' = {
  parent: product
  name: api.name
}

resource callerSubscription 'Microsoft.ApiManagement/service/subscriptions@2024-05-01' = [
  for item in subscriptions: {
    parent: service
    name: item.name
    properties: {
      displayName: item.displayName
      scope: product.id
      state: 'active'
    }
    dependsOn: [productApi]
  }
]

// Dedicated: the tables ApiManagementGatewayLogs and ApiManagementGatewayLlmLog. The hub gets the same records; the pipeline joins the two kinds by
// their correlation id. The hub must be in the region of the service.
resource toLogAnalytics 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = if (!empty(logAnalyticsWorkspaceId)) {
  scope: service
  name: 'aoai-usage-log-analytics'
  properties: {
    workspaceId: logAnalyticsWorkspaceId
    logAnalyticsDestinationType: 'Dedicated'
    logs: [
      { category: 'GatewayLogs', enabled: true }
      { category: 'GatewayLlmLogs', enabled: true }
    ]
  }
}

resource toEventHub 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = if (!empty(azureMonitorRuleId)) {
  scope: service
  name: 'aoai-usage-event-hub'
  properties: {
    eventHubAuthorizationRuleId: azureMonitorRuleId
    eventHubName: usageHubName
    logs: [
      { category: 'GatewayLogs', enabled: true }
      { category: 'GatewayLlmLogs', enabled: true }
    ]
  }
}

@description('Name of the service.')
output name string = service.name

@description('Resource id of the API.')
output id string = api.id

@description('Path of the API on the gateway.')
output path string = api.properties.path
