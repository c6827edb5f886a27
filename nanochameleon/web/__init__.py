"""Optional. Buys a page in the browser to talk to a model, see its tokens and judge its answers; and an HTTP API."""
