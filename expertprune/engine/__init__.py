"""Who does the work: the processes of one pass, and the tasks of a sweep on one machine or many."""
