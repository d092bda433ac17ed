// Application Gateway with its firewall, in front of API Management. With a certificate it serves HTTPS under your host name; without one it only
// sends callers on to API Management's own HTTPS address, because a subscription key must never travel in the clear.

@description('Region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Names begin with it.')
param namePrefix string

@description('Label of its address: <label>.<region>.cloudapp.azure.com; unique in the region.')
@maxLength(63)
param domainNameLabel string

@description('Subnet that nothing else is in.')
param subnetId string

@description('Host name of API Management.')
param apiManagementHostName string

@description('Host name that callers use, the one of the certificate. Its DNS record is yours to make. Blank: any.')
param hostName string = ''

@description('Key Vault secret with the certificate, without version: https://<vault>.vault.azure.net/secrets/<name>. Blank: redirect only.')
param certificateSecretId string = ''

@description('Resource id of the user-assigned identity that reads the certificate.')
param identityId string

@description('Capacity units that are always there.')
@minValue(0)
@maxValue(125)
param minCapacity int = 0

@description('Capacity units at most.')
@minValue(2)
@maxValue(125)
param maxCapacity int = 4

@description('Detection only logs what Prevention blocks.')
@allowed(['Prevention', 'Detection'])
param firewallMode string = 'Prevention'

@description('Seconds that a call may take; longer than the 240 of the API\'s policy.')
@minValue(1)
@maxValue(86400)
param requestTimeoutSeconds int = 300

@description('Log Analytics workspace that gets the access and firewall logs.')
param logAnalyticsWorkspaceId string

var name = '${namePrefix}-gateway'
var secure = !empty(certificateSecretId)
var id = resourceId('Microsoft.Network/applicationGateways', name)

resource firewall 'Microsoft.Network/ApplicationGatewayWebApplicationFirewallPolicies@2024-07-01' = {
  name: '${namePrefix}-firewall'
  location: location
  tags: tags
  properties: {
    policySettings: {
      state: 'Enabled'
      mode: firewallMode
      // Prompts hold SQL, HTML and shell commands as a matter of course: rules on the body would block honest calls. Addresses and headers are still
      // inspected. Bodies may be as large as Azure OpenAI takes them: recordings and images too.
      requestBodyCheck: false
      requestBodyEnforcement: false
      fileUploadEnforcement: false
    }
    managedRules: {
      managedRuleSets: [
        {
          ruleSetType: 'Microsoft_DefaultRuleSet'
          ruleSetVersion: '2.1'
        }
      ]
    }
  }
}

resource address 'Microsoft.Network/publicIPAddresses@2024-07-01' = {
  name: '${name}-address'
  location: location
  tags: tags
  sku: {
    name: 'Standard'
  }
  properties: {
    publicIPAllocationMethod: 'Static'
    dnsSettings: {
      domainNameLabel: domainNameLabel
    }
  }
}

var httpListener = {
  name: 'http'
  properties: {
    frontendIPConfiguration: { id: '${id}/frontendIPConfigurations/public' }
    frontendPort: { id: '${id}/frontendPorts/http' }
    protocol: 'Http'
  }
}

var httpsListener = {
  name: 'https'
  properties: union(
    {
      frontendIPConfiguration: { id: '${id}/frontendIPConfigurations/public' }
      frontendPort: { id: '${id}/frontendPorts/https' }
      protocol: 'Https'
      sslCertificate: { id: '${id}/sslCertificates/certificate' }
    },
    empty(hostName) ? {} : { hostName: hostName, requireServerNameIndication: true }
  )
}

var redirectRule = {
  name: 'redirect'
  properties: {
    ruleType: 'Basic'
    priority: 200
    httpListener: { id: '${id}/httpListeners/http' }
    redirectConfiguration: { id: '${id}/redirectConfigurations/https' }
  }
}

var gatewayRule = {
  name: 'api-management'
  properties: {
    ruleType: 'Basic'
    priority: 100
    httpListener: { id: '${id}/httpListeners/https' }
    backendAddressPool: { id: '${id}/backendAddressPools/api-management' }
    backendHttpSettings: { id: '${id}/backendHttpSettingsCollection/api-management' }
  }
}

resource gateway 'Microsoft.Network/applicationGateways@2024-07-01' = {
  name: name
  location: location
  tags: tags
  identity: {
    type: 'UserAssigned'
    userAssignedIdentities: { '${identityId}': {} }
  }
  properties: {
    sku: {
      name: 'WAF_v2'
      tier: 'WAF_v2'
    }
    autoscaleConfiguration: {
      minCapacity: minCapacity
      maxCapacity: maxCapacity
    }
    firewallPolicy: {
      id: firewall.id
    }
    enableHttp2: true
    // streamed answers are passed on as they come
    globalConfiguration: {
      enableRequestBuffering: true
      enableResponseBuffering: false
    }
    sslPolicy: {
      policyType: 'Predefined'
      policyName: 'AppGwSslPolicy20220101'
    }
    gatewayIPConfigurations: [{ name: 'subnet', properties: { subnet: { id: subnetId } } }]
    frontendIPConfigurations: [{ name: 'public', properties: { publicIPAddress: { id: address.id } } }]
    frontendPorts: [
      { name: 'http', properties: { port: 80 } }
      { name: 'https', properties: { port: 443 } }
    ]
    sslCertificates: secure ? [{ name: 'certificate', properties: { keyVaultSecretId: certificateSecretId } }] : []
    backendAddressPools: [{ name: 'api-management', properties: { backendAddresses: [{ fqdn: apiManagementHostName }] } }]
    backendHttpSettingsCollection: [
      {
        name: 'api-management'
        properties: {
          protocol: 'Https'
          port: 443
          pickHostNameFromBackendAddress: true
          requestTimeout: requestTimeoutSeconds
          probe: { id: '${id}/probes/api-management' }
        }
      }
    ]
    probes: [
      {
        name: 'api-management'
        properties: {
          protocol: 'Https'
          // API Management answers it without a key
          path: '/status-0123456789abcdef'
          pickHostNameFromBackendHttpSettings: true
          interval: 30
          timeout: 30
          unhealthyThreshold: 3
          match: { statusCodes: ['200'] }
        }
      }
    ]
    httpListeners: secure ? [httpListener, httpsListener] : [httpListener]
    redirectConfigurations: [
      {
        name: 'https'
        properties: union(
          {
            redirectType: 'Permanent'
            includePath: true
            includeQueryString: true
          },
          secure ? { targetListener: { id: '${id}/httpListeners/https' } } : { targetUrl: 'https://${apiManagementHostName}' }
        )
      }
    ]
    requestRoutingRules: secure ? [gatewayRule, redirectRule] : [redirectRule]
  }
}

resource logs 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = {
  scope: gateway
  name: 'log-analytics'
  properties: {
    workspaceId: logAnalyticsWorkspaceId
    logAnalyticsDestinationType: 'Dedicated'
    logs: [
      { category: 'ApplicationGatewayAccessLog', enabled: true }
      { category: 'ApplicationGatewayFirewallLog', enabled: true }
    ]
  }
}

@description('Name of the gateway.')
output name string = gateway.name

@description('Resource id of the gateway.')
output id string = gateway.id

@description('Public address.')
output ipAddress string = address.properties.ipAddress

@description('Host name that callers use: yours, or without a certificate API Management\'s.')
output hostName string = !secure ? apiManagementHostName : empty(hostName) ? address.properties.dnsSettings.fqdn : hostName
