//! Plans that are read, and plans that are refused.

use super::*;

fn read(text: &str) -> Result<Plan> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    Plan::read(file.path())
}

#[test]
fn reads_what_it_writes() {
    let plan = Plan { samples: 3, variants: vec!["3bit-64g-act".parse().unwrap()], ..Plan::default() };
    assert_eq!(read(&toml::to_string(&plan).unwrap()).unwrap(), plan);
    assert_eq!(read("samples = 7").unwrap(), Plan { samples: 7, ..Plan::default() });
}

#[test]
fn names_the_nearest_key() {
    let error = read("sample = 7").unwrap_err();
    assert!(error.to_string().starts_with("unknown key `sample` in"), "{error}");
    assert_eq!(error.hint().unwrap(), "did you mean `samples`?");
    let error = read("seq_len = 7").unwrap_err();
    assert_eq!(error.hint().unwrap(), "did you mean `seq-len`?");
    assert!(read("zebra = 7").unwrap_err().hint().is_none());
}

#[test]
fn refuses_values_that_make_no_sense() {
    let cases = [
        Plan { samples: 0, ..Plan::default() },
        Plan { seq_len: 1, ..Plan::default() },
        Plan { damp: Some(-0.1), ..Plan::default() },
        Plan { damp: Some(f64::NAN), ..Plan::default() },
        Plan { asymmetric: Some(1.5), ..Plan::default() },
        Plan { asymmetric: Some(f64::NAN), ..Plan::default() },
        Plan { output_hessian: Some(1.5), ..Plan::default() },
        Plan { output_hessian: Some(f64::NAN), ..Plan::default() },
        Plan { asymmetric: Some(0.5), shared_hessian: true, ..Plan::default() },
        Plan { variants: vec![], ..Plan::default() },
        Plan { variants: [Plan::default().variants, Plan::default().variants].concat(), ..Plan::default() },
        Plan { max_shard_size: 10, ..Plan::default() },
    ];
    for plan in cases {
        assert!(plan.check().is_err(), "{plan:?}");
    }
    Plan::default().check().unwrap();
}
