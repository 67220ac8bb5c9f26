//! What `--help` prints, of the program and of every command, in the files of `snapshots`. `INSTA_UPDATE=always scripts/test help`
//! writes them anew.

use crate::helpers::Lab;

/// The commands that the help of the program lists.
fn commands(help: &str) -> Vec<String> {
    let (_, listed) = help.split_once("Commands:\n").expect("a list of commands");
    let lines = listed.lines().take_while(|line| !line.is_empty());
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn every_command_explains_itself() {
    let lab = Lab::empty();
    // Output is not a terminal here: the width is that of the variable.
    let help = |args: &[&str]| lab.run_with(&[("COLUMNS", "100")], args).succeeds().stdout;
    let program = help(&["--help"]);
    insta::assert_snapshot!("help", program);
    let commands = commands(&program);
    assert!(commands.len() > 9, "{commands:?}");
    for command in commands.iter().filter(|command| *command != "help") {
        insta::assert_snapshot!(format!("help_{command}"), help(&[command, "--help"]));
    }
}
