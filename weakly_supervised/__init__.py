"""Anomaly detection by a few labelled anomalies, a method a file: python -m weakly_supervised.wscxr --help"""
