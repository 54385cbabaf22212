"""Defaults for variables that libraries read: a script sets them before it imports the library."""

# Used as os.environ.update(MLFLOW_DEFAULTS | os.environ), so that what the user has set counts.
MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # With MLflow's own defaults, a server that does not answer would hold up a command for a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "PGCONNECT_TIMEOUT": "30",
}

# OpenMP's idle threads soon sleep then. By default they spin, so that two programs on the same cores hardly go on.
# (GNU's OpenMP takes GOMP_SPINCOUNT before OMP_WAIT_POLICY; another OpenMP knows the second alone.)
OPENMP_DEFAULTS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
