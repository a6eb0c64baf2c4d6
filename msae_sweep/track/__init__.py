"""MLflow: a journal on disk first, a sender behind it.

`Tracker` (tracker) is what a sweep calls. It appends events to a journal (journal), and a thread (sender) replays them
into MLflow: runs, params and metrics (runs), models and the registry (models). Nothing here imports mlflow before the
sender connects (connection), so that neither the command line nor a trial ever waits for it.
"""
