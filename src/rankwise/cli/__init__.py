"""The command line: parse, make a spec or a recipe, call once. The commands, in the order of ``--help``."""

from rankwise.cli import adapter_commands, recipe_commands, serving_commands
from rankwise.cli.app import app

for command in (
    recipe_commands.new,
    recipe_commands.train,
    recipe_commands.plan,
    recipe_commands.check,
    recipe_commands.init,
    adapter_commands.merge,
    adapter_commands.squeeze,
    adapter_commands.combine,
    adapter_commands.extract,
    adapter_commands.convert,
    adapter_commands.export,
    adapter_commands.doctor,
    adapter_commands.inspect,
    adapter_commands.generate,
    serving_commands.chat,
    serving_commands.serve,
    adapter_commands.analyze,
    adapter_commands.push,
    recipe_commands.study,
    recipe_commands.sweep,
    recipe_commands.compare,
    recipe_commands.demo,
    adapter_commands.methods,
):
    app.command()(command)

__all__ = ["app"]
