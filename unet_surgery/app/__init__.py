"""The demo: a page in the browser on which a model draws beside its teacher.

``models`` decides who draws, ``wish`` what, ``studio`` draws and measures; none of them knows gradio. ``page`` is the
page, ``server`` serves it to this machine alone, ``demo`` puts all together.
"""
