"""The routes: what a request's JSON means, and the JSON and events of its answer."""
