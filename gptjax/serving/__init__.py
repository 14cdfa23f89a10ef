"""HTTP requests to generation: scheduler, API, page."""
