//! Every check by itself: a breach, its message, and the largest allowed value.

use serde_json::{Value, json};

use super::{MAIN, OTHER, WINDOWS, changed, figures, judged, lines, run, thresholds};
use crate::gate::{Thresholds, Verdict, judge, judge_alone};

/// Breaches of `run` under `limits`, against the good run.
fn breaches(run: &Value, limits: &str) -> Vec<String> {
    lines(&judge(&figures(run), &figures(&super::run()), &thresholds(limits)))
}

#[test]
fn a_good_run_passes_against_itself() {
    let judgement = judged(&run());
    assert_eq!((lines(&judgement), judgement.verdict()), (vec![], Verdict::Pass));
    assert_eq!(judge_alone(&figures(&run()), &Thresholds::default()).verdict(), Verdict::Pass);
}

#[test]
fn every_key_has_a_check_that_can_fail() {
    let kl = "/evaluations/0/models/0/window_kl";
    let nll = |shift: f64| json!((0..WINDOWS).map(|w| 2.0 + 0.3 * w as f64 + shift).collect::<Vec<_>>());
    let first = "/branches/0/linears/0";
    let cases: [(&str, Value, &str, String); 20] = [
        (kl, json!(vec![0.1; WINDOWS]), "max-kl-growth = inf", format!("{MAIN}: KL divergence on text 0.100000; at most 0.050000 allowed [max-kl]")),
        ("/evaluations/0/models/0/window_nll", nll(0.06), "max-perplexity-growth = inf", format!("{MAIN}: perplexity 16.6099 on text, fp16's is 15.6426: +6.2%; at most +5.0% allowed [max-perplexity-increase]")),
        ("/evaluations/0/models/0/window_nll", nll(0.006), "max-perplexity-change = 0.09", format!("{MAIN}: perplexity 15.7368 on text, fp16's is 15.6426: +0.0941; at most +0.0900 allowed [max-perplexity-change]")),
        ("/evaluations/0/models/0/window_top1", json!(vec![0.89; WINDOWS]), "max-top1-drop = inf", format!("{MAIN}: top-1 agreement on text 89.00%; at least 90.00% needed [min-top1]")),
        (kl, json!([0.012, 0.014, 0.010, 0.013, 0.011, 0.012]), "", format!("{MAIN}: KL divergence 0.012000 on text, the baseline's is 0.010000: +20.0% (95% over paired windows +20.0% to +20.0%); at most +10.0% allowed [max-kl-growth]")),
        ("/evaluations/0/models/0/window_nll", nll(0.021), "", format!("{MAIN}: perplexity 15.9746 on text, the baseline's is 15.6583: +2.0% (95% over paired windows +0.8% to +3.2%); at most +1.0% allowed [max-perplexity-growth]")),
        ("/evaluations/0/models/0/window_top1", json!(vec![0.94; WINDOWS]), "", format!("{MAIN}: drop of top-1 agreement to 94.00% on text, from the baseline's 95.00%: +1.00% (95% over paired windows +1.00% to +1.00%); at most +0.50% allowed [max-top1-drop]")),
        ("/branches/0/linears/6/relative_error", json!(0.6), "max-linear-error-growth = inf\nmax-mean-error-growth = inf", format!("{MAIN}: error of model.layers.0.l6, the worst linear, 0.6000; at most 0.5000 allowed [max-linear-error]")),
        (&format!("{first}/relative_error"), json!(0.026), "", format!("{MAIN}: error of model.layers.0.l0 0.0260, the baseline's is 0.0200: +30.0%; at most +25.0% allowed [max-linear-error-growth]")),
        ("/branches/0/linears/6/relative_error", json!(0.0985), "", format!("{MAIN}: mean error of linears 0.0526, the baseline's is 0.0500: +5.3%; at most +5.0% allowed [max-mean-error-growth]")),
        (&format!("{first}/damp_raised"), json!(3), "", format!("{MAIN}: linears with raised damping: 1; at most 0 allowed [max-damp-raised]")),
        (&format!("{first}/dead_columns"), json!(5), "", format!("{MAIN}: dead input features: 5; at most 0 allowed [max-dead-columns]")),
        (first, json!({ "name": "model.layers.0.l0", "relative_error": 0.02, "damp_raised": 0, "dead_columns": 0, "fallback": "singular" }), "", format!("{MAIN}: linears rounded instead of solved: 1; at most 0 allowed [max-fallbacks]")),
        ("/branches/0/scale_bits", json!(8), "", format!("{MAIN}: significant bits that scales use, of fp16's 11: 8; at least 10 needed [min-scale-bits]")),
        ("/branches/0/bytes", json!(1.02e6), "", format!("{MAIN}: size 1.0 MB, the baseline's is 1.0 MB: +2.0%; at most +1.0% allowed [max-size-growth]")),
        ("/branches/0/bytes", json!(9e6), "max-size-growth = inf\nmax-size = 8000000", format!("{MAIN}: size 9.0 MB; at most 8.0 MB allowed [max-size]")),
        ("/seconds", json!(150.0), "max-seconds = 120", "time of the run 150.0 s; at most 120.0 s allowed [max-seconds]".into()),
        ("/seconds", json!(150.0), "max-seconds-growth = 0.2", "time of the run 150.0 s, the baseline's is 100.0 s: +50.0%; at most +20.0% allowed [max-seconds-growth]".into()),
        ("/peak_memory_bytes", json!(3e9), "max-memory = 2e9", "peak memory 3.00 GB; at most 2.00 GB allowed [max-memory]".into()),
        ("/peak_memory_bytes", json!(3e9), "max-memory-growth = 1", "peak memory 3.00 GB, the baseline's is 1.00 GB: +200.0%; at most +100.0% allowed [max-memory-growth]".into()),
    ];
    let mut seen: Vec<String> = cases
        .iter()
        .map(|(place, value, limits, expected)| {
            assert_eq!(
                breaches(&changed(place, value.clone()), limits),
                std::slice::from_ref(expected),
                "{place}"
            );
            expected.rsplit_once('[').unwrap().1.trim_end_matches(']').to_owned()
        })
        .collect();
    // These two have tests of their own.
    seen.extend(["max-missing-branches".into(), "same-plan".into()]);
    seen.sort();
    let mut keys: Vec<String> = Thresholds::defaults().into_iter().map(|(key, _)| key).collect();
    keys.sort();
    assert_eq!(seen, keys);
}

/// A change that the windows' scatter explains is none, however large its mean.
#[test]
fn noise_does_not_fail_a_job() {
    let noisy =
        changed("/evaluations/0/models/0/window_kl", json!([0.001, 0.030, 0.002, 0.028, 0.001, 0.020]));
    let judgement = judged(&noisy);
    assert_eq!(lines(&judgement), [""; 0]);
    let growth = judgement.branches[0].growth.unwrap();
    assert!(growth.value > 0.3 && growth.low < 0.0, "{growth:?}");
    // A better run passes too.
    assert_eq!(
        lines(&judged(&changed("/evaluations/0/models/0/window_kl", json!(vec![0.005; WINDOWS])))),
        [""; 0]
    );
}

#[test]
fn missing_branches_are_named() {
    let mut less = run();
    less["branches"].as_array_mut().unwrap().pop();
    let reason = format!(
        "1 of 2 branches of the plan and the baseline are missing: {OTHER}; at most 0 may be missing [max-missing-branches]"
    );
    assert_eq!(lines(&judged(&less)), [reason]);
    assert_eq!(breaches(&less, "max-missing-branches = 1"), [""; 0]);
    // Also where the plan has fewer than the baseline, and where there is no baseline yet.
    less["plan"]["variants"].as_array_mut().unwrap().pop();
    assert_eq!(lines(&judged(&less)).len(), 1);
    let alone = judge_alone(&figures(&less), &Thresholds::default());
    assert_eq!(lines(&alone), [""; 0]);
    less["plan"]["variants"].as_array_mut().unwrap().push("2bit-16g".into());
    let alone = judge_alone(&figures(&less), &Thresholds::default());
    assert!(lines(&alone)[0].contains("1 of 2 branches of the plan are missing: gptq-2bit-16g"), "{alone:?}");
}

#[test]
fn another_plan_is_noted_and_a_reason_to_fail_if_asked() {
    let other = changed("/plan/damp", json!(1.0));
    let judgement = judged(&other);
    assert_eq!(
        (lines(&judgement).len(), judgement.notes.as_slice()),
        (0, &["damp 1.0, the baseline's is 0.01".to_owned()][..])
    );
    assert_eq!(breaches(&other, "same-plan = true"), ["damp 1.0, the baseline's is 0.01 [same-plan]"]);
    let tokens = changed("/calibration/sha256", json!("other"));
    assert_eq!(
        breaches(&tokens, "same-plan = true"),
        ["calibrated on other tokens than the baseline, by the same plan [same-plan]"]
    );
}

#[test]
fn a_branch_is_judged_by_its_own_limits() {
    let mut worse = changed("/evaluations/0/models/0/window_kl", json!(vec![0.1; WINDOWS]));
    worse["evaluations"][0]["models"][1]["window_kl"] = json!(vec![0.1; WINDOWS]);
    let limits = format!("max-kl-growth = inf\n[branch.{OTHER}]\nmax-kl = 0.2");
    let found = breaches(&worse, &limits);
    assert!(found.len() == 1 && found[0].starts_with(MAIN), "{found:?}");
    let unknown = breaches(&run(), "[branch.mian]\nmax-kl = 1");
    assert_eq!(
        unknown,
        ["thresholds name branch mian, which neither the run nor the baseline has [thresholds]"]
    );
}

/// One branch evaluated on a further text, by hand, is not judged there, and does not make the others fail; `--dataset` judges it.
#[test]
fn a_trial_of_one_branch_on_another_text_is_not_judged() {
    let good = figures(&run());
    let mut more = run();
    let mut further = more["evaluations"][0].clone();
    further["dataset"] = "more".into();
    further["sha256"] = "fedcba".into();
    further["models"].as_array_mut().unwrap().pop();
    further["models"][0]["window_kl"] = json!(vec![0.1; WINDOWS]);
    more["evaluations"].as_array_mut().unwrap().push(further);
    let chosen = |more: &Value, datasets: &[&str]| {
        let mut figures = figures(more);
        figures.evaluations[1].beside = true;
        let datasets: Vec<String> = datasets.iter().map(|&name| name.to_owned()).collect();
        let remarks = figures.choose(&datasets, Some(&good));
        remarks.map(|remarks| (figures, remarks))
    };
    let (judged, remarks) = chosen(&more, &[]).unwrap();
    assert_eq!(judged.evaluations, good.evaluations);
    assert_eq!(
        remarks,
        [format!("not judged: more, 6 windows of 64 tokens, measured of {MAIN}; --dataset more judges it")]
    );
    assert_eq!(lines(&judge(&judged, &good, &Thresholds::default())), [""; 0]);
    // On the text that is asked for, every branch must have been evaluated.
    let (judged, remarks) = chosen(&more, &["more"]).unwrap();
    let found = lines(&judge_alone(&judged, &Thresholds::default()));
    assert_eq!(
        found,
        [
            format!("{MAIN}: KL divergence on more 0.100000; at most 0.050000 allowed [max-kl]"),
            format!("{OTHER}: was not evaluated on more [evaluation]"),
        ]
    );
    assert!(remarks.len() == 1 && remarks[0].starts_with("not judged: text, 6 windows"), "{remarks:?}");
    let error = chosen(&more, &["moer"]).unwrap_err().to_string();
    assert_eq!(error, "dataset: expected a text that was evaluated: more, text, found `moer`");
    // A trial on the run's own text, in other windows: it cannot be chosen by name, and messages tell the two apart.
    for (key, value) in [("dataset", json!("text")), ("seq_len", json!(31)), ("stride", json!(31))] {
        more["evaluations"][1][key] = value;
    }
    let (judged, remarks) = chosen(&more, &["text"]).unwrap();
    assert_eq!(judged.evaluations, good.evaluations);
    assert_eq!(remarks, [format!("not judged: text, 6 windows of 31 tokens, measured of {MAIN}")]);
    let found = lines(&judge_alone(&figures(&more), &Thresholds::default()));
    let unique: std::collections::BTreeSet<&String> = found.iter().collect();
    assert_eq!(unique.len(), found.len(), "{found:?}");
    assert!(found[0].contains("KL divergence on text, 6 windows of 31 tokens 0.1"), "{found:?}");
}

/// Experts, fused projections and parallel blocks: a layer has as many linears as in the model.
#[test]
fn linears_are_counted_as_the_architecture_has_them() {
    let mut experts = run();
    let linears: Vec<Value> = ["qkv_proj", "o_proj"]
        .map(|name| format!("self_attn.{name}"))
        .into_iter()
        .chain((0..4).flat_map(|e| ["w1", "w2", "w3"].map(|w| format!("block_sparse_moe.experts.{e}.{w}"))))
        .map(|path| {
            let mut linear = experts["branches"][0]["linears"][0].clone();
            linear["name"] = format!("model.layers.0.{path}").into();
            linear
        })
        .collect();
    experts["model"]["linears"] = linears.len().into();
    for branch in experts["branches"].as_array_mut().unwrap() {
        branch["linears"] = linears.clone().into();
    }
    let judgement = judge(&figures(&experts), &figures(&experts), &Thresholds::default());
    assert_eq!((lines(&judgement), judgement.verdict()), (vec![], Verdict::Pass));
    // An expert that is missing, and one that is there twice.
    let [mut less, mut twice] = [experts.clone(), experts.clone()];
    less["branches"][0]["linears"].as_array_mut().unwrap().pop();
    twice["branches"][0]["linears"][13] = twice["branches"][0]["linears"][12].clone();
    for run in [less, twice] {
        let alone = judge_alone(&figures(&run), &Thresholds::default());
        assert_eq!(lines(&alone), [format!("{MAIN}: 13 of 14 linears were quantized [linears]")]);
    }
    experts["model"].as_object_mut().unwrap().remove("linears");
    let alone = judge_alone(&figures(&experts), &Thresholds::default());
    let expected = format!(
        "{MAIN}: 14 linears were quantized, and the report does not say how many the model has [linears]"
    );
    assert_eq!((lines(&alone).len(), &lines(&alone)[0]), (2, &expected));
}
