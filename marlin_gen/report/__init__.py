"""The report: pictures and one HTML page from the committed measurements below ``tuned/``, and from nothing else.

``data`` reads the files, ``series`` computes what is drawn, ``pictures`` draws (the only part that needs matplotlib),
``page`` writes HTML.
"""
