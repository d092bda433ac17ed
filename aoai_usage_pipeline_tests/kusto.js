// Microsoft's Kusto language service over queries: {"tables": {name: schema}, "queries": [text]} on standard input, and for each query its faults and the
// columns of its result on standard output.
const [folder] = process.argv.slice(2);
require(`${folder}/bridge.min.js`);
require(`${folder}/Kusto.Language.Bridge.min.js`);
const {GlobalState, KustoCode, Diagnostic, Symbols} = Kusto.Language;
const {tables, queries} = JSON.parse(require("fs").readFileSync(0, "utf8"));

const database = new Symbols.DatabaseSymbol.$ctor1("db", Object.entries(tables).map(([name, schema]) => Symbols.TableSymbol.From(schema).WithName(name)));
const known = GlobalState.Default.WithDatabase(database);

const all = (list, type) => Array.from({length: list.Count}, (_, i) => System.Array.getItem(list, i, type));
const answers = queries.map((query) => {
    const code = KustoCode.ParseAndAnalyze(query, known);
    const faults = all(code.GetDiagnostics(), Diagnostic).map((found) => `${found.Message} ${query.slice(found.Start, found.Start + 30)}`);
    const columns = code.ResultType?.Columns ? all(code.ResultType.Columns, Symbols.ColumnSymbol).map((column) => [column.Name, column.Type.Name]) : [];
    return {faults, columns: Object.fromEntries(columns)};
});
process.stdout.write(JSON.stringify(answers));
