// The workbook over the pipeline's own telemetry: infra/workbook.json on the Application Insights component.

@description('Azure region of the workbook.')
param location string

@description('Tags of every resource.')
param tags object

@description('Beginning of the name that people see.')
param namePrefix string = 'aoai-usage'

@description('Resource id of the Application Insights component that the pipeline sends to.')
param applicationInsightsId string

resource workbook 'Microsoft.Insights/workbooks@2022-04-01' = {
  name: guid(resourceGroup().id, namePrefix, 'workbook')
  location: location
  tags: tags
  kind: 'shared'
  properties: {
    displayName: '${namePrefix}: pipeline'
    category: 'workbook'
    sourceId: applicationInsightsId
    serializedData: loadTextContent('../workbook.json')
    version: '1.0'
  }
}

@description('Name of the workbook, a UUID.')
output name string = workbook.name

@description('Resource id of the workbook.')
output id string = workbook.id
