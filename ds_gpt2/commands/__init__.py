"""The verbs of ``./launch.sh``: each module adds its arguments and runs them.

``add_arguments(parser)`` adds the arguments of a verb. ``run(options)`` runs it and returns the exit code; it raises
UserError for an error that the user can fix, which ``cli`` prints as one line.
"""
