// Reads a JSON object of M expressions from standard input and prints the faults that Microsoft's own parser finds, by name.
const path = require("node:path");
const { DefaultSettings, TaskUtils } = require(path.join(process.argv[2], "node_modules/@microsoft/powerquery-parser"));

(async () => {
    const expressions = JSON.parse(require("node:fs").readFileSync(0, "utf8"));
    const faults = {};
    for (const [name, text] of Object.entries(expressions)) {
        const read = await TaskUtils.tryLexParse(DefaultSettings, text);
        if (!TaskUtils.isParseStageOk(read)) faults[name] = read.error.message;
    }
    console.log(JSON.stringify(faults));
})();
