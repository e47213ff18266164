// Formulas, as a list of [TeX, whether it stands alone], to HTML: from standard input to output.
const path = require("node:path");
const katex = require(path.resolve(process.argv[2], "katex"));
const formulas = JSON.parse(require("node:fs").readFileSync(0, "utf8"));
const options = { throwOnError: true, strict: "ignore", output: "htmlAndMathml" };
const html = formulas.map(([tex, displayMode]) =>
  katex.renderToString(tex, { ...options, displayMode })
);
process.stdout.write(JSON.stringify(html));
