"""Dashboards, built in Python from the metrics in `otel_odibi.names`: `python -m grafana.build` writes their JSON."""
