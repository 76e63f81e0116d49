"""Cut the base as a plan says, repair what stays, and write the expert."""
