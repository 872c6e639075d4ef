"""The engine behind HTTP, spoken to as OpenAI's chat completions: `protocol`, `fetch` (pictures), `app`."""
