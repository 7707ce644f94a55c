"""Anomaly detection with a few labelled anomalies, one method a file: `python -m weakly_supervised.wscxr --help`."""
