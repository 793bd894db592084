"""The chart's dashboard, drawn in a real browser from what a real Prometheus scraped of the cluster lab."""
