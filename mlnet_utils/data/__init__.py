"""Photos and where people looked: reading, preparing, splitting and loading them.

Photos, their geometry and densities, the download of public data sets and the loader that
feeds training live here. Networks and scores do not.
"""
