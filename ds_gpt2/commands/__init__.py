"""The verbs of ``./launch.sh``: each module adds its arguments and runs them."""
