"""The parts of report.html. Nothing here is imported before a page is rendered: it needs matplotlib and jinja2.

parts      what a page is made of: sections of figures, tables, tiles and quotations
words      figures as a person would say them
subjects   the models a report is about, in one form whatever the command
summary    the verdict and the headline figures
accuracy   fidelity, domains, tasks, the worst contexts
speed      latency and throughput
pruning    what was removed and what that saves
distillation  how a student learned
blocks     errors, bits and sparsity inside the model
about      texts, cost, environment, how to load the result
plots      drawings of plain numbers
looks      how models are told apart in them
svg        a drawing as inline SVG that follows the page's colours
"""
