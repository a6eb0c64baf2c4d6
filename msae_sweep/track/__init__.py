"""Tracking with MLflow: events are written to a journal on disk first, and a sender sends them to MLflow.

A sweep calls `Tracker` (tracker), which appends events to a journal (journal). A sender (sender), by default in a
process of its own (sender_process), applies the events to MLflow (event_handlers): runs, params and metrics (runs),
models and the registry (logged_models). No module here imports mlflow before the sender connects (connection), so
neither the command line nor a trial ever waits for that import.
"""
