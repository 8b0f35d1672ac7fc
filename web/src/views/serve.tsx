/* The command that serves this folder with its model. */

import type { JSX } from "preact";

export const Serve = (): JSX.Element => <code class="command">unsleep serve FOLDER --model MODEL --dictionaries …</code>;
