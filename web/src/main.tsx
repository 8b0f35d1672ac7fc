import "../../src/unsleep/pages/page.css";
import "./styles/explorer.css";
import "./styles/circuit.css";

import { render } from "preact";

import { App } from "./app";
import { start } from "./state/data";

const root = document.getElementById("explorer");
if (root) render(<App />, root);
void start();
