"""The pages of the report: what is read of a run, the words around the figures, and the templates."""
