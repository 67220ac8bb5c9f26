//! The same judgement in every form, with names that each of them has to escape.

use serde_json::json;

use super::{MAIN, WINDOWS, changed, figures, judged, run};
use crate::gate::{Judgement, Thresholds, github, judge, judge_alone, junit, markdown, text};

/// A run that fails once.
fn failed() -> Judgement {
    judged(&changed("/evaluations/0/models/0/window_kl", json!(vec![0.1; WINDOWS])))
}

/// The same with a branch and a text whose names are hostile to every form.
fn hostile() -> Judgement {
    let evil = "a<b>&\"'|`x`\u{1}%0A\n::error::no";
    let mut value = run();
    value["branches"][0]["branch"] = evil.into();
    value["evaluations"][0]["models"][0]["name"] = evil.into();
    value["evaluations"][0]["dataset"] = evil.into();
    judge(&figures(&value), &figures(&run()), &Thresholds::default())
}

#[test]
fn text_names_reasons_and_the_verdict() {
    insta::assert_snapshot!(text(&failed(), false));
    let passed = text(&judged(&run()), false);
    assert!(passed.ends_with("\npassed: 33 checks\n") && !passed.contains("FAILED"), "{passed}");
    let all = text(&judged(&run()), true);
    assert_eq!(all.lines().filter(|line| line.starts_with("ok     ")).count(), 33);
    // A line for each reason, whatever names are in it.
    let judgement = hostile();
    let found = text(&judgement, true);
    let checks =
        found.lines().filter(|line| line.starts_with("ok     ") || line.starts_with("FAILED ")).count();
    assert_eq!(
        (checks, found.lines().count()),
        (
            judgement.checks.len(),
            judgement.checks.len() + judgement.notes.len() + judgement.branches.len() + 1
        )
    );
}

#[test]
fn github_shows_reasons_as_annotations() {
    insta::assert_snapshot!(github(&failed()));
    for line in github(&hostile()).lines() {
        assert!(
            line.starts_with("::error title=gptq gate") || line.starts_with("::notice title=gptq gate"),
            "{line}"
        );
    }
    assert!(github(&judged(&run())).ends_with("::notice title=gptq gate::passed: 33 checks\n"));
}

#[test]
fn junit_is_xml_that_counts_what_failed() {
    for judgement in
        [failed(), hostile(), judged(&run()), judge_alone(&figures(&json!({})), &Thresholds::default())]
    {
        let xml = junit(&judgement);
        let document = roxmltree::Document::parse(&xml).unwrap_or_else(|e| panic!("{e}\n{xml}"));
        let root = document.root_element();
        let all = |name: &str| root.descendants().filter(|n| n.has_tag_name(name)).count();
        assert_eq!(root.tag_name().name(), "testsuites");
        assert_eq!(root.attribute("tests").unwrap(), judgement.checks.len().to_string());
        assert_eq!(root.attribute("failures").unwrap(), judgement.breaches().count().to_string());
        assert_eq!((all("testcase"), all("failure")), (judgement.checks.len(), judgement.breaches().count()));
        let messages: Vec<&str> = root
            .descendants()
            .filter(|n| n.has_tag_name("failure"))
            .map(|n| n.attribute("message").unwrap())
            .collect();
        let findings: Vec<String> =
            judgement.breaches().map(|check| check.finding.replace('\u{1}', "\u{FFFD}")).collect();
        assert_eq!(messages, findings);
        for suite in root.children().filter(|n| n.has_tag_name("testsuite")) {
            let cases = suite.children().filter(|n| n.has_tag_name("testcase")).count();
            assert_eq!(suite.attribute("tests").unwrap(), cases.to_string());
        }
    }
}

#[test]
fn markdown_has_the_reasons_and_a_table() {
    insta::assert_snapshot!(markdown(&failed()));
    let found = markdown(&hostile());
    let rows: Vec<&str> = found.lines().filter(|line| line.starts_with('|')).collect();
    let cells = |row: &str| row.replace("\\|", "").matches('|').count();
    assert!(rows.iter().all(|row| cells(row) == 8), "{found}");
    assert!(!found.contains("<b>"), "{found}");
}

#[test]
fn what_rounds_to_nothing_has_one_sign() {
    use crate::gate::checklist::percent;
    assert_eq!([-0.0004, 0.0004, -0.0006, 0.012].map(percent), ["+0.0%", "+0.0%", "-0.1%", "+1.2%"]);
}

#[test]
fn json_has_every_check() {
    let value = serde_json::to_value(failed().to_json()).unwrap();
    assert_eq!(value["verdict"], "fail");
    assert_eq!(value["checks"].as_array().unwrap().len(), 33);
    let breached: Vec<_> =
        value["checks"].as_array().unwrap().iter().filter(|c| c["breached"] == true).collect();
    assert_eq!((&breached[0]["branch"], &breached[0]["check"]), (&MAIN.into(), &"max-kl".into()));
    assert_eq!(serde_json::to_value(judged(&run()).to_json()).unwrap()["verdict"], "pass");
}
