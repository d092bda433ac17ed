// The three alerts over the pipeline's own telemetry, and the action group that tells people. Every alert is named after its section in docs/runbook.md.

@description('Azure region of the rules.')
param location string

@description('Tags of every resource.')
param tags object

@description('Beginning of the names.')
param namePrefix string = 'aoai-usage'

@description('Resource id of the Application Insights component that the pipeline sends to.')
param applicationInsightsId string

@description('Mail addresses that are told.')
param emails string[] = []

@description('Where the runbook can be read; the section is added as an anchor.')
param runbookUrl string = 'docs/runbook.md'

@description('Capture lag, in minutes, from which capture-lags fires. More than the capture window and two minutes for writing a file.')
@minValue(5)
param maxLagMinutes int = 60

@description('Share of successful calls that must report their usage, in percent, below which usage-not-billable fires.')
@minValue(0)
@maxValue(100)
param minCoveragePercent int = 95

@description('Requests without a price on one usage date above which usage-not-billable fires.')
@minValue(0)
param maxUnpricedRequests int = 0

resource actionGroup 'Microsoft.Insights/actionGroups@2023-01-01' = {
  name: '${namePrefix}-alerts'
  location: 'Global'
  tags: tags
  properties: {
    enabled: true
    groupShortName: 'aoai-usage'
    emailReceivers: [
      for (email, i) in emails: {
        name: 'mail-${i}'
        emailAddress: email
        useCommonAlertSchema: true
      }
    ]
  }
}

var failsQuery = '''
customMetrics
| where name == 'aoai.runs.failed' and valueSum > 0
| summarize amount = sum(valueSum) by what = strcat('failed runs of ', tostring(customDimensions.job))
| union (
    customMetrics
    | where name == 'aoai.held.days'
    | summarize arg_max(timestamp, valueSum) by table = tostring(customDimensions.table)
    | where valueSum > 0
    | project what = strcat('held days of ', table), amount = valueSum
)
'''

var lagsQuery = '''
customMetrics
| where name == 'aoai.capture.lag.minutes'
| summarize arg_max(timestamp, valueSum)
| where valueSum > MAX_LAG_MINUTES
| project what = 'capture lag in minutes', amount = valueSum
| union (
    customMetrics
    | where name == 'aoai.capture.lost.events'
    | summarize arg_max(timestamp, valueSum)
    | where valueSum > 0
    | project what = 'events lost before capture', amount = valueSum
)
| union (
    customMetrics
    | where name == 'aoai.runs.failed'
    | summarize amount = count()
    | where amount == 0
    | project what = 'no telemetry', amount = 1.0
)
'''

// one alert of a kind and not one of every usage date: a new model would send a mail for each
var notBillableQuery = '''
customMetrics
| where name == 'aoai.coverage'
| summarize arg_max(timestamp, valueSum) by usage_date = tostring(customDimensions.usage_date)
| where valueSum * 100 < MIN_COVERAGE_PERCENT
| summarize days = count(), amount = min(valueSum)
| where days > 0
| project what = 'low coverage', amount
| union (
    customMetrics
    | where name == 'aoai.unpriced.requests'
    | summarize arg_max(timestamp, valueSum) by usage_date = tostring(customDimensions.usage_date)
    | where valueSum > MAX_UNPRICED_REQUESTS
    | summarize days = count(), amount = sum(valueSum)
    | where days > 0
    | project what = 'requests without a price', amount
)
| union (
    customMetrics
    | where name == 'aoai.runs.failed' or (name == 'aoai.run.duration' and tostring(customDimensions.job) in ('bill', 'daily_run'))
    | summarize measured = minif(timestamp, name == 'aoai.runs.failed'), billed = maxif(timestamp, name == 'aoai.run.duration')
    | where measured < ago(26h) and (isnull(billed) or billed < ago(26h))
    | project what = 'no bill for 26 hours', amount = 1.0
)
'''

var rules = [
  {
    name: 'run-failed-or-day-held'
    text: 'A run failed in the last 15 minutes, or days are held.'
    severity: 1
    query: failsQuery
    every: 'PT5M'
    window: 'PT15M'
  }
  {
    name: 'capture-lags'
    text: 'Events are in the hub and not yet in an ingested file for too long, or were lost, or nothing was measured for 30 minutes.'
    severity: 1
    query: replace(lagsQuery, 'MAX_LAG_MINUTES', string(maxLagMinutes))
    every: 'PT5M'
    window: 'PT30M'
  }
  {
    name: 'usage-not-billable'
    text: 'Nothing was billed for 26 hours, too few calls reported their usage, or usage has no price.'
    severity: 2
    query: replace(replace(notBillableQuery, 'MIN_COVERAGE_PERCENT', string(minCoveragePercent)), 'MAX_UNPRICED_REQUESTS', string(maxUnpricedRequests))
    every: 'PT1H'
    // a day and a night's run: the figures of a usage date come again every night, not at the same minute
    window: 'P2D'
  }
]

resource alerts 'Microsoft.Insights/scheduledQueryRules@2022-06-15' = [
  for rule in rules: {
    name: '${namePrefix}-${rule.name}'
    location: location
    tags: tags
    kind: 'LogAlert'
    properties: {
      displayName: '${namePrefix}: ${rule.name}'
      description: '${rule.text} What to do: ${runbookUrl}#${rule.name}'
      enabled: true
      severity: rule.severity
      scopes: [
        applicationInsightsId
      ]
      evaluationFrequency: rule.every
      windowSize: rule.window
      autoMitigate: true
      criteria: {
        allOf: [
          {
            query: rule.query
            timeAggregation: 'Count'
            operator: 'GreaterThan'
            threshold: 0
            dimensions: [
              {
                name: 'what'
                operator: 'Include'
                values: [
                  '*'
                ]
              }
            ]
            failingPeriods: {
              numberOfEvaluationPeriods: 1
              minFailingPeriodsToAlert: 1
            }
          }
        ]
      }
      actions: {
        actionGroups: [
          actionGroup.id
        ]
      }
    }
  }
]

@description('Name of the action group.')
output name string = actionGroup.name

@description('Resource id of the action group.')
output id string = actionGroup.id
