"""HTTP: the OpenAI-compatible API and the guard that stands in front of the API and the page."""
