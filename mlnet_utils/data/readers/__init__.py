"""One file per data set: its layout on disk and how it becomes photos with fixations."""
